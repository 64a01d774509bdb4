"""Hooks for hypervisor backends, and the observer of leases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wnodes_core.markers import hookspec

if TYPE_CHECKING:
    from wnodes_core.model import Filesystem, Process, Vm
    from wnodes_core.ports import Nic


@hookspec(firstresult=True)
def wnodes_vm_probe(accel: str, folder: str) -> dict[str, Any]:
    """Called to learn what this host can run; may take seconds, so callers remember the answer.

    :param accel: the site's wish: ``kvm``, ``tcg`` or ``auto``.
    :param folder: a private folder to work in.
    :returns: ``{"accel": "kvm"|"tcg", "notice": str, "qemu": version, "libvirt": version}``.
    :raises HostError: nothing usable, or ``kvm`` demanded where no probe guest runs under it.
    """


@hookspec(firstresult=True)
def wnodes_vm_start(vm: Vm) -> Process:
    """Called in the keeper, as the job's user, to define and start the VM.

    :param vm: what to start. Its disks exist. Its channels' sockets exist on return.
    :returns: the hypervisor's process.
    :raises HostError: it does not start here.
    """


@hookspec(firstresult=True)
def wnodes_vm_pause(vm: Vm, paused: bool) -> bool:
    """Called to stop and resume the VM's clock and cpus while the LRMS suspends the job.

    :param vm: as given to ``wnodes_vm_start``, in the same process.
    :param paused: True to pause, False to resume.
    """


@hookspec(firstresult=True)
def wnodes_vm_plug(vm: Vm, nic: Nic) -> bool | None:
    """Called once the guest answers, to give the running VM a NIC; a clone's template has none.

    :param vm: as given to ``wnodes_vm_start``, in the same process.
    :param nic: what it is connected to on the host. It goes with the VM.
    :returns: True when the guest has it on its bus, None if this backend has no such NIC.
    :raises TransientError: it could not be plugged.
    """


@hookspec(firstresult=True)
def wnodes_filesystems_plug(vm: Vm, filesystems: tuple[Filesystem, ...]) -> bool | None:
    """Called once a clone runs, to give it file systems of the host as devices; its template has none.

    :param vm: as given to ``wnodes_vm_clone``, in the same process.
    :param filesystems: whose gateways listen already; they go with the VM. None at all to ask whether it could be.
    :returns: True when they are plugged in, None if this backend plugs none into this VM.
    :raises TransientError: they could not be.
    """


@hookspec(firstresult=True)
def wnodes_vm_ask_agent(vm: Vm, command: str, timeout_s: int) -> str | None:
    """Called while an ordinary cloud image boots: ask QEMU's guest agent in it, in JSON.

    :param vm: as given to ``wnodes_vm_start``, in the same process.
    :param command: one command of QEMU's guest agent protocol.
    :param timeout_s: how long it may take.
    :returns: its answer, or None while no agent is there.
    :raises ImageError: the agent refuses the command.
    """


@hookspec(firstresult=True)
def wnodes_vm_stop(vm: Vm) -> bool | None:
    """Called to end the VM at once, in any process with the right to; idempotent.

    :param vm: as given to ``wnodes_vm_start``; that call may never have returned.
    :returns: True when no process of the VM is left.
    """


@hookspec(firstresult=True)
def wnodes_vm_list() -> list[dict[str, Any]]:
    """Called to list this user's (for root: everybody's) VMs: name, pid, uid, started."""


@hookspec
def wnodes_lease_changed(lease: dict[str, Any], event: str) -> None:
    """Called after a lease changed its state; observers only, errors are logged and dropped.

    :param lease: id, job, image, state; ``trace`` (name, begin, seconds of each phase); ``start`` (kind, way, …).
    :param event: ``prepared``, ``starting``, ``running``, ``become``, ``ending``, ``gone``, ``failed``.
    """
