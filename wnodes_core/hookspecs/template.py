"""Hooks for warm start: saving a booted guest once, cloning it for each job.

A backend offers ways (``mapped``, ``saved``); the builder asks for them in the site's order. What the
guest does at rest and at wake is the guest agent's business (``guest/guest_identity.py``), not the backend's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wnodes_core.markers import hookspec

if TYPE_CHECKING:
    from wnodes_core.model import Process, Template, Vm


@hookspec
def wnodes_template_ways(accel: str) -> Sequence[str]:
    """Called to learn in which ways a guest can be saved and cloned here; quick, no guest is started.

    :param accel: ``kvm`` or ``tcg``.
    :returns: of ``mapped`` and ``saved`` those that this backend offers on this host.
    """


@hookspec(firstresult=True)
def wnodes_template_host(accel: str) -> str | None:
    """Called to tell one hypervisor from another: a template is used only where this is what it was.

    :param accel: ``kvm`` or ``tcg``.
    :returns: a text that changes with the hypervisor's program (version, file) and, under KVM, with the
        processor; quick, for it is asked at each start.
    """


@hookspec(firstresult=True)
def wnodes_template_start(vm: Vm, way: str) -> Process | None:
    """Called in the builder of a template: boot a guest that can be saved in this way.

    :param vm: what to start; ``vm.folder`` will become the template's and takes what the way needs.
    :param way: ``mapped`` or ``saved``.
    :returns: the hypervisor's process, None if the way is another backend's.
    :raises HostError: it does not start here.
    """


@hookspec(firstresult=True)
def wnodes_template_save(vm: Vm, way: str) -> dict[str, Any] | None:
    """Called in the builder once the guest is at rest: stop it for good and write down its state.

    :param vm: as given to ``wnodes_template_start``, in the same process.
    :param way: as given there.
    :returns: ``{"memory": path, "files": {name: path}}``, all below ``vm.folder``, synced; its QEMU has ended.
    :raises TransientError: it could not be saved.
    """


@hookspec(firstresult=True)
def wnodes_vm_clone(vm: Vm, template: Template) -> Process | None:
    """Called in the keeper, as the job's user: start the VM as a clone of the template; it runs on return.

    :param vm: what to start; its disks exist, the first one on the template's. Its memory is the
        template's own or, up to ``template.shape.most_mib``, more.
    :param template: what to clone; its files are only ever read.
    :returns: the hypervisor's process, None if the template is another backend's. ``wnodes_vm_stop``
        and the other hooks work on it as on a VM that was booted.
    :raises WnodesError: no clone; nothing of it runs. The caller boots instead.
    """


@hookspec(firstresult=True)
def wnodes_vm_fit(vm: Vm, template: Template) -> bool | None:
    """Called in the pool's warden, when a job claims a clone that waits: give it what the job has. It stands still.

    :param vm: as given to ``wnodes_vm_clone``, in the same process, but with the job's memory and ``cpuset``.
    :param template: what it was cloned from.
    :returns: True when it is done, False or None if the VM is another's or gone. A backend that never
        does it has no pool.
    :raises TransientError: it cannot be had; the job gets a fresh clone.
    """
