"""The guest channel: how a command runs in the guest as if it ran here.

``guest_bootstrap`` (in the image) -> agent (``frames``, ``pump``, ``guest_*``, sent by ``bundle``)
-> ``channel`` and ``relay`` (in the keeper) -> ``client`` (in the launcher).
"""
