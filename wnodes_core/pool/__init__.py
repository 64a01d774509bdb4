"""The pool: clones that were restored before their job came, each with a keeper that waits.

``wire`` speaks between the processes, ``warden`` owns one slot's hypervisor, ``keeper`` waits as root and becomes
the job's user at the claim, ``pooled`` is the keeper's view of the VM it takes over. wnodesd's side:
``wnodes_core.agent.pool``.
"""
