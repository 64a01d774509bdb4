"""Becomes one NFS gateway: ``nfs_serve NAME``, as root, in the node's own namespaces; its orders come on stdin.

The source is opened by a child with the job's own rights and mounted in a mount namespace of the gateway's own, where
there is little else: whatever becomes of the gateway, no mount of it is left. Then ganesha runs here with three
capabilities, shut in by Landlock, and this process stays beside it (``nfs_handles``). ``{"port"}`` or ``{"problem"}``
is said on stdout once it listens or does not.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from wnodes_core.storage import confine, nfs_handles

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # the same on every architecture; Linux 5.12
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000  # linux/fcntl.h
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4  # linux/mount.h
_RDONLY, _NOSUID, _NODEV = 1, 2, 4  # MOUNT_ATTR_*, the same
_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 0x4000, 1 << 18, 2
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP = 1, 24  # linux/prctl.h
# NET_BIND_SERVICE: its port is one that only root may open. The others: it acts as the job's user, and opens files
# by their handles. linux/capability.h
_DAC_READ_SEARCH, _SETGID, _SETUID, _NET_BIND_SERVICE = 2, 6, 7, 10
_KEPT = (_DAC_READ_SEARCH, _SETGID, _SETUID, _NET_BIND_SERVICE)
_OPEN_S, _LISTEN_S, _LOG_BYTES = 10.0, 20.0, 8000

SERVER = "/usr/bin/ganesha.nfsd"
SHARE = "/share"
_ROOT = "/tmp"  # where the gateway's own root is made, in its own namespace: every host has it
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin")
_FILES = ("/etc/ld.so.cache", "/etc/netconfig", "/etc/services", "/etc/protocols", "/etc/nsswitch.conf")
_OWN = ("/run/ganesha", "/var/lib/nfs/ganesha", "/var/log/ganesha", "/tmp", "/etc/ganesha")
_LOG = "/var/log/ganesha/log"  # in memory, and gone with the gateway: it never stops speaking
_DEVICES = ("/dev/null", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Serve until the server ends."""
    told = json.loads(sys.stdin.buffer.read())
    try:
        share = _share(told)
        _own_root(share)
        Path("/ganesha.conf").write_text(told["config"])
        child, listener = _start(sys.argv[1], bool(told["read_only"]))
        judge = nfs_handles.Judge(child, listener, SHARE)
        problem = _until_it_listens(child, judge, told["port"])
    except OSError as error:
        problem = str(error)
    if problem:
        with suppress(OSError):
            sys.stderr.write(Path(_LOG).read_text(errors="replace")[-_LOG_BYTES:])
    sys.stdout.write(json.dumps({"problem": problem} if problem else {"port": told["port"]}) + "\n")
    sys.stdout.flush()
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    if problem:
        sys.exit(1)
    judge.answer()


def _share(told: dict[str, Any]) -> int:
    """The user's folder as a mount that is nowhere yet. Raises OSError."""
    folder = _opened_as_user(told)
    try:
        if not stat.S_ISDIR(os.fstat(folder).st_mode):
            raise NotADirectoryError(f"source {told['source']!r}: want a folder")
        tree = _call(_OPEN_TREE, folder, b"", _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC)
    finally:
        os.close(folder)
    attributes = _NOSUID | _NODEV | (_RDONLY if told["read_only"] else 0)
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)  # struct mount_attr: to set, to clear, propagation, userns
    _call(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, wanted, len(wanted))
    return tree


def _opened_as_user(told: dict[str, Any]) -> int:
    """The source, opened by a process that has the job's rights and no more: the path is the user's. Raises OSError.

    Within a time limit: the path may lead into a file system that does not answer.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _open_as_user(theirs, told)
    theirs.close()
    try:
        if not select.select([ours], [], [], _OPEN_S)[0]:
            raise TimeoutError(f"source {told['source']!r}: its file system did not answer in {_OPEN_S:.0f} s")
        said, fds, _, _ = socket.recv_fds(ours, 4096, 1)
    finally:
        ours.close()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # one that hangs in the kernel is left to its file system
        os.waitpid(pid, os.WNOHANG)
    if not fds:
        raise PermissionError(f"source {told['source']!r}: {said.decode(errors='replace') or 'nobody opened it'}")
    return fds[0]


def _open_as_user(answer: socket.socket, told: dict[str, Any]) -> None:
    """Never returns."""
    try:
        os.setgroups(told["groups"])
        os.setresgid(*[told["gid"]] * 3)
        os.setresuid(*[told["uid"]] * 3)
        os.close(os.open(told["source"], os.O_RDONLY | os.O_DIRECTORY))  # readable, as every provider wants it
        socket.send_fds(answer, [b"."], [os.open(told["source"], os.O_PATH | os.O_DIRECTORY)])
    except OSError as error:
        answer.send(f"{error.strerror}: want a folder you can read".encode())
    finally:
        os._exit(0)


def _own_root(share: int) -> None:
    """A root of our own: the share, what programs need to run, and nothing of the host besides. Raises OSError."""
    trees = {path: _clone(path) for path in (*_SYSTEM, "/proc") if os.path.isdir(path) and not os.path.islink(path)}
    links = {path: os.readlink(path) for path in _SYSTEM if os.path.islink(path)}
    files = {path: Path(path).read_bytes() for path in _FILES if os.path.exists(path)}
    devices = {path: _clone(path) for path in _DEVICES}
    _checked(_libc.unshare(_NEWNS))
    _checked(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    _checked(_libc.mount(b"none", _ROOT.encode(), b"tmpfs", 0, b"mode=755,size=16m"))
    # The share comes first: of several mounts of one file system ganesha takes the first for the file system's own.
    for path, tree in {SHARE: share, **trees}.items():
        os.makedirs(_ROOT + path, exist_ok=True)
        _attach(tree, _ROOT + path)
    os.makedirs(f"{_ROOT}/dev")
    os.makedirs(f"{_ROOT}/etc")
    for path, tree in devices.items():
        Path(_ROOT + path).touch()
        _attach(tree, _ROOT + path)
    for path, data in files.items():
        Path(_ROOT + path).write_bytes(data)
    for path, target in links.items():
        os.symlink(target, _ROOT + path)
    for path in _OWN:
        os.makedirs(_ROOT + path, mode=0o700)
    os.symlink("/run", f"{_ROOT}/var/run")
    os.symlink("/proc/self/mounts", f"{_ROOT}/etc/mtab")
    os.chdir(_ROOT)
    pivot = {"x86_64": 155, "aarch64": 41, "ppc64le": 203, "s390x": 217}[os.uname().machine]
    _call(pivot, b".", b".")  # pivot_root(2), "pivot_root(".", ".")"
    _checked(_libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def _clone(path: str) -> int:
    return _call(_OPEN_TREE, _AT_FDCWD, path.encode(), _OPEN_TREE_CLONE | os.O_CLOEXEC)


def _attach(tree: int, path: str) -> None:
    _call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, path.encode(), _MOVE_MOUNT_F_EMPTY_PATH)
    os.close(tree)


def _start(name: str, read_only: bool) -> tuple[int, int]:
    """The server's pid, and the fd by which it asks about handles. Raises OSError."""
    rules = [(path, confine.READ_AND_RUN) for path in _SYSTEM]
    rules += [("/", confine.READ_DIR), ("/proc", confine.READ), ("/etc", confine.READ), ("/ganesha.conf", confine.READ)]
    rules += [(path, confine.READ_FILE | confine.WRITE_FILE) for path in _DEVICES]
    rules += [(path, confine.ALL_BUT_RUN) for path in _OWN]
    rules.append((SHARE, confine.READ if read_only else confine.ALL_BUT_RUN))
    # It opens sockets of its own, which a full ruleset forbids.
    ruleset = confine.make_ruleset(rules, files_only=True)
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            os.setsid()
            _checked(_libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0))
            _drop_capabilities()
            confine.restriction(ruleset)()
            socket.send_fds(theirs, [b"."], [nfs_handles.listen()])
            if os.getppid() == parent:
                argv = [SERVER, "-F", "-f", "/ganesha.conf", "-L", _LOG, "-N", "NIV_CRIT", "-p", f"/run/ganesha/{name}.pid"]
                os.execve(SERVER, argv, {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"})
        except OSError as error:
            theirs.send(str(error).encode())
        finally:
            os._exit(127)
    theirs.close()
    os.close(ruleset)
    said, fds, _, _ = socket.recv_fds(ours, 4096, 1)
    ours.close()
    if not fds:
        raise OSError(said.decode() or "the server ended")
    return pid, fds[0]


def _drop_capabilities() -> None:
    for number in range(64):
        if number not in _KEPT and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) < 0:
            break  # there are no more


def _until_it_listens(child: int, judge: nfs_handles.Judge, port: int) -> str:
    """'' once it does, else why not."""
    deadline = time.monotonic() + _LISTEN_S
    while time.monotonic() < deadline:
        judge.answer(0.02)
        if os.waitpid(child, os.WNOHANG)[0]:
            return "ganesha ended at once: its words are in wnodesd's log"
        if _listens(child, port):
            # It serves, though nothing, also without an export that it does not like.
            return "" if _has_open(child, SHARE) else "ganesha does not serve this file system"
    return f"ganesha does not listen after {_LISTEN_S:.0f} s"


def _has_open(child: int, path: str) -> bool:
    folder = f"/proc/{child}/fd"
    return any(os.readlink(f"{folder}/{name}") == path for name in os.listdir(folder))


def _listens(child: int, port: int) -> bool:
    for name in ("tcp", "tcp6"):
        with suppress(OSError), open(f"/proc/{child}/net/{name}", encoding="ascii") as file:
            rows = [line.split()[1:4] for line in file]
            if any(row[0].endswith(f":{port:04X}") and row[2] == "0A" for row in rows[1:]):
                return True
    return False


def _call(number: int, *arguments: int | bytes) -> int:
    words = [each if isinstance(each, bytes) else ctypes.c_long(each) for each in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *words))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"nfs gateway: {os.strerror(number)}")
    return int(result)


if __name__ == "__main__":
    main()
