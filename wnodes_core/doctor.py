"""What can be wrong with a worker node, found before a job finds it.

Each check is a small function of the host and the settings that returns one Finding; ``CHECKS`` is
the table of them. A *problem* stops VMs or makes them unsafe, a *notice* costs speed or comfort.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable

from wnodes_core import doctor_network, doctor_unit
from wnodes_core import settings as settings_module
from wnodes_core.doctor_finding import Finding
from wnodes_core.doctor_finding import notice as _notice
from wnodes_core.doctor_finding import ok as _ok
from wnodes_core.doctor_finding import problem as _problem
from wnodes_core.doctor_host import Host
from wnodes_core.doctor_scratch import scratch
from wnodes_core.errors import SettingsError, WnodesError
from wnodes_core.settings import Settings

Check = Callable[[Host, Settings], Finding]
_SUN_PATH = 107  # bytes of a Unix socket's path (unix(7))
# The longest of a lease's sockets; an id has at most 32 characters. libvirt's own are deeper down,
# but the backend binds them by a short name.
_LEASE_SOCKET = "/leases/" + 32 * "x" + "/mount23.sock"
_MIN_FREE = 5 << 30


def kvm_device(host: Host, settings: Settings) -> Finding:
    """Is there a /dev/kvm that the jobs' users can open?"""
    found = host.stat("/dev/kvm")
    if found is None:
        tell = _problem if settings.accel == "kvm" else _notice
        return tell(
            "kvm device",
            "no /dev/kvm: VMs are emulated (TCG), many times slower",
            "switch virtualisation on in the firmware (or the hypervisor above); load kvm_intel or kvm_amd",
        )
    shown = f"/dev/kvm is {stat.filemode(found.st_mode)}, uid {found.st_uid}, gid {found.st_gid}"
    if found.st_mode & 0o006 == 0o006:
        return _ok("kvm device", shown)
    if found.st_mode & 0o060 == 0o060 and found.st_gid != 0:
        return _notice(
            "kvm device", shown, "VMs run as the jobs' users: put all of them into its group, or chmod 666 it"
        )
    # libvirt then asks QEMU for its capabilities again at every single start (56 s were measured).
    return _notice(
        "kvm device",
        f"{shown}: VMs of ordinary users are emulated, and libvirt may probe QEMU anew at every start (a minute)",
        'chmod 666 /dev/kvm, and for good: KERNEL=="kvm", MODE="0666" in /etc/udev/rules.d/65-kvm.rules',
    )


def hypervisor(host: Host, settings: Settings) -> Finding:
    """Does the backend start here, and does KVM run a guest's instructions?"""
    try:
        answer = host.probe(settings)
    except WnodesError as error:
        return _problem("hypervisor", error.message, error.hint or "see wnodes plugins")
    versions = f"{answer.get('accel')}, QEMU {answer.get('qemu')}, libvirt {answer.get('libvirt')}"
    if answer.get("notice"):
        return _notice(
            "hypervisor", f"{versions}: {answer['notice']}", "where VMs must be fast, use a node whose KVM works"
        )
    return _ok("hypervisor", versions)


def libvirt_parts(host: Host, _: Settings) -> Finding:
    """Are libvirt's QEMU driver and its Python binding there?"""
    if not host.module("libvirt"):
        return _problem(
            "libvirt", "no Python module libvirt", "pip install libvirt-python (needs libvirt-dev, pkg-config, gcc)"
        )
    drivers = host.glob("/usr/lib*/**/libvirt/connection-driver/libvirt_driver_qemu.so")
    if not drivers:
        return _problem(
            "libvirt", "no QEMU driver (libvirt_driver_qemu.so)", "install libvirt-daemon-driver-qemu or libvirt-daemon"
        )
    return _ok("libvirt", drivers[0])


def qemu_img(host: Host, _: Settings) -> Finding:
    """Can overlays be made?"""
    found = host.program("qemu-img")
    return _ok("qemu-img", found) if found else _problem("qemu-img", "not found", "install qemu-utils (EL: qemu-img)")


def storage(host: Host, settings: Settings) -> Finding:
    """Which providers can serve folders to guests here?"""
    found = host.storage(settings)
    told = {name: found.get(name, "there is no such provider") for name in settings.storage.order}
    seen = ", ".join(f"{name}: {problem or 'usable'}" for name, problem in told.items())
    if others := [f"{name} ({problem or 'usable'})" for name, problem in found.items() if name not in told]:
        seen += f"; not in the site's order: {', '.join(others)}"
    if not any(told.values()):
        return _ok("storage", seen)
    tell = _problem if all(told.values()) else _notice  # none usable: no folder can be mounted
    return tell("storage", seen, "install what is missing, or change storage.order")


def sshfs(host: Host, _: Settings) -> Finding:
    """Can guests whose image has no sshfs be lent ours?"""
    if client := host.program("sshfs"):
        return _ok("sshfs", client)
    return _notice("sshfs", "not found", "install sshfs: guests whose image lacks it are lent the host's")


def landlock(host: Host, _: Settings) -> Finding:
    """Can gateways be confined to the folder they serve?"""
    abi = host.landlock()
    if abi >= 2:
        return _ok("landlock", f"ABI {abi}")
    return _notice(
        "landlock",
        f"ABI {abi}: a gateway is not confined to its folder (it still has only the user's own rights)",
        "boot a kernel from 5.19 on with landlock in lsm=",
    )


def state_dir(host: Host, settings: Settings) -> Finding:
    """Is there room, on a file system that disks can live on?"""
    name, space = "state folder", host.space(settings.state_dir)
    seen = (
        f"{settings.state_dir}: {space.kind} at {space.mounted_at}, {space.free >> 30} of {space.total >> 30} GiB free"
    )
    if space.free < _MIN_FREE:
        return _problem(name, seen, "free space, or wnodes image purge")
    if space.kind.startswith(("nfs", "fuse", "lustre", "gpfs", "beegfs", "ceph")):
        return _problem(name, f"{seen}: shared between nodes", "set state_dir to a local disk")
    if space.kind in ("tmpfs", "ramfs"):
        return _notice(name, f"{seen}: disks are kept in memory", "set state_dir to a local disk")
    if host.direct_io(settings.state_dir) is False:
        return _notice(name, f"{seen}, no O_DIRECT: guests' disks go through the page cache", "use ext4 or xfs")
    return _ok(name, seen)


def run_dir(host: Host, settings: Settings) -> Finding:
    """Do sockets vanish at a reboot?"""
    space = host.space(settings.run_dir)
    seen = f"{settings.run_dir}: {space.kind} at {space.mounted_at}"
    if space.kind == "tmpfs":
        return _ok("run folder", seen)
    return _notice("run folder", f"{seen}: it outlives a reboot", "set run_dir to a folder below /run")


def socket_paths(_: Host, settings: Settings) -> Finding:
    """Do the paths of a lease's sockets fit?"""
    longest = settings.state_dir + _LEASE_SOCKET
    length = len(longest.encode())
    if length > _SUN_PATH:
        over = length - _SUN_PATH
        return _problem("socket paths", f"{length} bytes, {over} too many", f"make state_dir {over} bytes shorter")
    return _ok("socket paths", f"{length} of {_SUN_PATH} bytes")


def cgroups(host: Host, _: Settings) -> Finding:
    """Can a batch system limit a job's memory and cpus?"""
    unified = host.text("/sys/fs/cgroup/cgroup.controllers").split()
    legacy = {
        word for line in host.text("/proc/self/cgroup").splitlines() for word in line.split(":")[1].split(",") if word
    }
    version, controllers = ("v2", set(unified)) if unified else ("v1", legacy)
    missing = {"cpu", "memory"} - controllers
    seen = f"{version}: {' '.join(sorted(controllers)) or 'no controllers'}"
    if missing:
        return _notice("cgroups", seen, f"limits of {' and '.join(sorted(missing))} cannot be kept here")
    return _ok("cgroups", seen)


def user_namespaces(host: Host, _: Settings) -> Finding:
    """Can images be built without root?"""
    switched_off = (
        host.text("/proc/sys/user/max_user_namespaces").strip() in ("", "0")
        or host.text("/proc/sys/kernel/unprivileged_userns_clone").strip() == "0"
        or host.text("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").strip() == "1"
    )
    if switched_off:
        return _notice("user namespaces", "switched off", "only needed to build images as an ordinary user")
    return _ok("user namespaces", "on")


def vsock(host: Host, _: Settings) -> Finding:
    """Is there the faster channel?"""
    if host.stat("/dev/vhost-vsock"):
        return _ok("vsock", "/dev/vhost-vsock")
    # No advice to act on: everything works without it.
    return _ok("vsock", "no /dev/vhost-vsock: guests are reached through virtio-serial")


def networks(host: Host, settings: Settings) -> Finding:
    """Which kinds of networks are possible here, and can those of the settings be made?"""
    lacks = list(doctor_network.missing(host, settings))
    if lacks:
        advice = "; ".join(dict.fromkeys(advice for _, advice in lacks))
        return _problem("networks", "; ".join(seen for seen, _ in lacks), advice)
    possible = f"possible here: {doctor_network.possible(host)}"
    slows = doctor_network.slows(host)
    if slows and settings.network.networks:
        return _notice("networks", f"{possible}; {slows}", "sysctl net.bridge.bridge-nf-call-iptables=0")
    carried = settings.network.here(host.node_name())
    return _ok("networks", f"{possible}; carried: {', '.join(carried) or 'none'}")


def clock(host: Host, _: Settings) -> Finding:
    """Does the guest get a clock that is right and cheap to read?"""
    source = host.text("/sys/devices/system/clocksource/clocksource0/current_clocksource").strip()
    if host.clock_synchronised() is False:
        return _notice(
            "clock", f"{source}, not synchronised", "run chrony or systemd-timesyncd: guests start with this time"
        )
    if source not in ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter", ""):
        return _notice("clock", f"clock source {source} is slow to read", "find out in dmesg why it is not tsc")
    return _ok("clock", source or "synchronised")


def daemon(host: Host, settings: Settings) -> Finding:
    """Does wnodesd answer?"""
    try:
        answer = host.daemon(settings.daemon.socket)
    except WnodesError as error:
        return _problem("wnodesd", error.message, error.hint or "systemctl restart wnodesd")
    if answer is None:
        return _notice(
            "wnodesd",
            f"not running (no {settings.daemon.socket})",
            "needed for batch jobs: systemctl enable --now wnodesd",
        )
    seen = f"version {answer.get('version')}, pid {answer.get('pid')}, {answer.get('leases')} leases"
    if lacks := doctor_unit.lacking(host, settings, int(answer.get("pid", 0))):
        what = "; ".join(f"without {rights} (drop-in {name})" for name, rights in lacks.items())
        path = "/etc/systemd/system/wnodesd.service.d"
        advice = "; ".join(f"wnodesd --print-drop-in {name} > {path}/{name}.conf" for name in lacks)
        return _problem("wnodesd", f"{seen}: {what}", f"{advice}; systemctl daemon-reload; systemctl restart wnodesd")
    return _ok("wnodesd", seen)


def adapters(host: Host, settings: Settings) -> Finding:
    """Are adapters installed, do they load, and is each section of ``lrms`` one's own?"""
    found = host.adapters()
    broken = [f"{name}: {problem}" for name, problem in found.items() if problem]
    if broken:
        return _problem("adapters", "; ".join(broken), "reinstall the adapter, see wnodes plugins")
    unknown = sorted(set(settings.lrms) - set(found))
    if unknown:
        return _problem(
            "adapters", f"settings for {', '.join(unknown)}, which is not installed", "pip install wnodes-NAME"
        )
    if not found:
        return _notice(
            "adapters", "none installed", "needed for batch jobs: pip install wnodes-NAME, as in wnodes-slurm"
        )
    return _ok("adapters", ", ".join(sorted(found)))


CHECKS: tuple[Check, ...] = (
    *(kvm_device, hypervisor, libvirt_parts, qemu_img, storage, sshfs, scratch, landlock, state_dir, run_dir),
    *(socket_paths, cgroups, user_namespaces, vsock, networks, clock, daemon, adapters),
)


def examine(
    host: Host | None = None, checks: Iterable[Check] = CHECKS, load: Callable[[], Settings] | None = None
) -> list[Finding]:
    """Every check's finding, the settings first; with invalid settings the others go by the defaults.

    A check that itself fails is a problem that names the check; the others go on.
    """
    host = host or Host()
    try:
        settings = (load or settings_module.load)()
        seen = ", ".join(settings.sources) or "no file: defaults"
        findings = [_ok("settings", seen)]
    except SettingsError as error:
        settings, findings = Settings(), [_problem("settings", error.message, error.hint or "wnodes config check")]
    for check in checks:
        try:
            findings.append(check(host, settings))
        except Exception as error:  # noqa: BLE001 - one check must not hide the others
            name = check.__name__.replace("_", " ")
            findings.append(_problem(name, f"the check failed: {type(error).__name__}: {error}", "report this"))
    return findings
