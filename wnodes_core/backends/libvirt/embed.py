"""libvirt's QEMU driver inside this process. The one file that imports libvirt.

``qemu:///embed?root=FOLDER`` needs no daemon and no root; all of its state lies below FOLDER,
which is thrown away with the lease. A process can have one such driver, hence the module's state.

``python -m wnodes_core.backends.libvirt.embed`` prints libvirt's version; with a folder and an
emulator as arguments it also opens the driver there and has it learn QEMU's capabilities.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when libvirt is loaded. Its warnings ("tainted: high-privileges") would go to the job's stderr.
os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", "4:stderr")
import libvirt  # type: ignore[import-untyped]  # noqa: E402, I001
import libvirt_qemu  # type: ignore[import-untyped]  # noqa: E402

from wnodes_core.api import Process, errors
from wnodes_core.backends.libvirt import memory
from wnodes_core.backends.libvirt.domain import SAVED_NAME
from wnodes_core.backends.libvirt.reaping import reaping
from wnodes_core.tools import private_folder, write_atomic

# No cgroups: QEMU stays where the batch system put the keeper. No mount namespace, no ownership
# games, no virtlogd: each needs root or a daemon. ROOT/etc/qemu.conf is where the embedded driver
# looks (src/qemu/qemu_conf.c: configBaseDir = ROOT/etc).
_CONF = """\
user = "+{uid}"
group = "+{gid}"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
security_default_confined = 0
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
seccomp_sandbox = 1
"""

_lock = threading.Lock()
_connection: Any = None
_domains: dict[str, Any] = {}
_on_end: dict[str, Callable[[str], object]] = {}


def version() -> str:
    """libvirt's version, as in ``9.0.0``."""
    number = libvirt.getVersion()
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


def start(
    xml: str, name: str, root: Path, emulator: str, state_dir: str, on_end: Callable[[str], object], saved: str = ""
) -> None:
    """Define and start a domain that ends with its QEMU; ``saved`` is a save image to start it from.

    ``on_end`` is called with the name, in libvirt's thread, as soon as the guest has panicked,
    powered off or asked for a reset; it is to kill the QEMU.

    Raises LibvirtDown where the driver does not open, NoKvm, HostBusy when memory is short,
    TransientError with libvirt's words for all else.
    """
    with _lock:
        connection = _open(root, emulator, state_dir)
        try:
            _on_end[SAVED_NAME if saved else name] = lambda _: on_end(name)
            with reaping():
                _domains[name] = _restored(connection, xml, saved) if saved else connection.createXML(xml, 0)
        except libvirt.libvirtError as error:
            raise _translate(error, f"VM {name}") from error
        _carry_out(root, emulator, state_dir)


def _restored(connection: Any, xml: str, saved: str) -> Any:
    connection.restoreFlags(saved, xml, libvirt.VIR_DOMAIN_SAVE_RUNNING)
    return connection.lookupByName(SAVED_NAME)


def ask_monitor(name: str, command: str, **arguments: Any) -> Any:
    """Ask the QEMU of a domain of this process by its own monitor's words.

    Raises TransientError.
    """
    order = {"execute": command, **({"arguments": arguments} if arguments else {})}
    try:
        said = json.loads(libvirt_qemu.qemuMonitorCommand(_domains[name], json.dumps(order), 0))
    except libvirt.libvirtError as error:
        raise _translate(error, f"VM {name}: {command}") from error
    if "error" in said:
        raise errors.TransientError(f"VM {name}: {command}: {str(said['error'])[:500]}")
    return said["return"]


def save(name: str, path: str, process: Process) -> None:
    """Write a domain of this process to libvirt's save image; its QEMU ``process`` has ended on return.

    Raises TransientError.
    """
    try:
        # libvirt waits for the saved QEMU's end as it does for a probe's: 40 s if nobody reaps it, 10 s
        # more because it is deaf to SIGTERM (measured).
        with reaping(process):
            _domains[name].saveFlags(path, None, libvirt.VIR_DOMAIN_SAVE_RUNNING)
    except libvirt.libvirtError as error:
        raise _translate(error, f"VM {name}: saving") from error


def grow(name: str, more_mib: int) -> None:
    """Plug more memory into a domain of this process, as much as it can take. Raises TransientError."""
    if more_mib > 0:
        path = "/machine/peripheral/virtiomem0"
        ask_monitor(name, "qom-set", path=path, property="requested-size", value=more_mib << 20)


def pause(name: str, paused: bool) -> bool:
    """Stop or resume a domain that this process started; False if it did not, or it is gone."""
    domain = _domains.get(name)
    if domain is None:
        return False
    try:
        if paused:
            domain.suspend()
        else:
            domain.resume()
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
            return False
        raise _translate(error, f"VM {name}") from error
    return True


def plug(name: str, xml: str) -> bool:
    """Give a domain one more device; False if it is not this process's. Raises TransientError."""
    try:
        return name in _domains and _domains[name].attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE) == 0
    except libvirt.libvirtError as error:
        raise errors.TransientError(f"VM {name}: libvirt could not plug a device: {error}") from error


def ask_guest_agent(name: str, command: str, timeout_s: int) -> str | None:
    """Ask QEMU's own guest agent in a domain of this process; None while there is nobody to answer.

    libvirt itself sits on that port (it knows the name), so nobody else can speak to it.
    """
    domain = _domains.get(name)
    if domain is None:
        return None
    try:
        return str(libvirt_qemu.qemuAgentCommand(domain, command, timeout_s, 0))
    except libvirt.libvirtError as error:
        missing = (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED, libvirt.VIR_ERR_NO_DOMAIN)
        if error.get_error_code() in (*missing, libvirt.VIR_ERR_OPERATION_INVALID):
            return None
        raise errors.ImageError(f"{name}: QEMU's guest agent refuses: {error}") from error


def learn(root: Path, emulator: str, arch: str, state_dir: str) -> None:
    """Have libvirt learn QEMU's capabilities (2 s) and remember them for later starts.

    Raises LibvirtDown.
    """
    with _lock:
        connection = _open(root, emulator, state_dir)
        try:
            with reaping():
                connection.getDomainCapabilities(emulator, arch, None, "qemu", 0)
        except libvirt.libvirtError as error:
            raise _down(error, emulator) from error
        _carry_out(root, emulator, state_dir)


def _open(root: Path, emulator: str, state_dir: str) -> Any:
    global _connection
    if _connection is None:
        private_folder(root)
        (root / "etc").mkdir(exist_ok=True)
        write_atomic(root / "etc/qemu.conf", _CONF.format(uid=os.getuid(), gid=os.getgid()).encode())
        _carry_in(root, emulator, state_dir)
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_events, name="libvirt-events", daemon=True).start()
        try:
            _connection = libvirt.open(f"qemu:///embed?root={_short(root)}")
        except libvirt.libvirtError as error:
            raise _down(error, str(root)) from error
        _watch(_connection)
    return _connection


def _short(root: Path) -> str:
    # libvirt binds ROOT/lib/qemu/domain-1-NAME…/monitor.sock (45 bytes below ROOT), and a Unix socket's path
    # has 107. The kernel's own name for our open folder is short, and QEMU, same user, can follow it too.
    return f"/proc/{os.getpid()}/fd/{os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)}"


def _run_events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def _watch(connection: Any) -> None:
    # libvirt itself ends a guest that powered off or reset with SIGTERM, to which our QEMU is deaf
    # (qemu_x86_64.sh), and would leave it paused for ever.
    over = (libvirt.VIR_DOMAIN_EVENT_SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_CRASHED, libvirt.VIR_DOMAIN_EVENT_STOPPED)

    def changed(_connection: Any, domain: Any, event: int, _detail: int, _opaque: Any) -> None:
        if event in over and domain.name() in _on_end:
            _on_end[domain.name()](domain.name())

    connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, changed, None)


def _cache_file(root: Path, emulator: str) -> Path:
    # src/util/virfilecache.c: the SHA-256 of the key, which is the emulator's path. What makes the
    # file valid stands inside it (times of QEMU and of libvirt, access to KVM), not its own owner or time.
    return root / "cache/qemu/capabilities" / f"{hashlib.sha256(emulator.encode()).hexdigest()}.xml"


def _carry_in(root: Path, emulator: str, state_dir: str) -> None:
    file = _cache_file(root, emulator)
    data = memory.recall(file.name, state_dir)
    if data is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def _carry_out(root: Path, emulator: str, state_dir: str) -> None:
    file = _cache_file(root, emulator)
    if file.exists():
        data = file.read_bytes()
        if data != memory.recall(file.name, state_dir):
            memory.remember(file.name, data, state_dir)


def _down(error: libvirt.libvirtError, what: str) -> errors.LibvirtDown:
    hint = ""
    if "Failed to parse user" in str(error):
        hint = "as root libvirt wants the account it names: install libvirt-daemon-system, or run as an ordinary user"
    return errors.LibvirtDown(f"libvirt does not open its QEMU driver ({what}): {error}", hint=hint)


def _translate(error: libvirt.libvirtError, what: str) -> errors.WnodesError:
    text = f"{what}: libvirt could not start it: {error}"
    if "virt type 'kvm'" in text:
        return errors.NoKvm(text, hint="accel: auto falls back to TCG")
    if "annot allocate memory" in text or "cannot set up guest memory" in text:
        return errors.HostBusy(text, hint="the node has not that much memory free")
    if "no QEMU for" in text or "annot find QEMU" in text or "Cannot check QEMU binary" in text:
        return errors.LibvirtDown(text, hint="install QEMU")
    # Not proved to be the host's fault: a missing file or a full folder looks like this too.
    return errors.TransientError(text)


if __name__ == "__main__":
    print(version())
    if len(sys.argv) == 5:
        learn(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4])
