"""Becomes one NFS gateway: ``nfs_serve NAME``, as root, in the node's own namespaces; its orders come on stdin.

The source is opened by a child with the job's own rights and mounted in a mount namespace of the gateway's own, where
there is little else: whatever becomes of the gateway, no mount of it is left. Then ganesha runs here with six
capabilities, shut in by Landlock, and this process stays beside it and opens for it (``nfs_handles``). ``{"port"}``
or ``{"problem"}`` is said on stdout once it listens or does not.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from wnodes_core.storage import calls, confine, nfs_handles, nfs_source

_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_PR_CAPBSET_DROP = 24  # linux/prctl.h
# Measured with each left out: what ganesha makes it makes as the job's user (SETUID, SETGID); what is there it opens
# by its handle, as root, after it has judged the user's right itself (DAC_READ_SEARCH, DAC_OVERRIDE, FOWNER). Its
# port is one that only root may open (NET_BIND_SERVICE). No CHOWN: no file becomes another's. linux/capability.h
_DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER, _KILL = 1, 2, 3, 5
_SETGID, _SETUID, _NET_BIND_SERVICE, _SYS_PTRACE = 6, 7, 10, 19
_KEPT = (_DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER, _SETGID, _SETUID, _NET_BIND_SERVICE)
_LISTEN_S, _LOG_BYTES = 20.0, 8000

SERVER = "/usr/bin/ganesha.nfsd"
_ROOT = "/tmp"  # where the gateway's own root is made, in its own namespace: every host has it
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin")
_FILES = ("/etc/ld.so.cache", "/etc/netconfig", "/etc/services", "/etc/protocols", "/etc/nsswitch.conf")
_OWN = ("/run/ganesha", "/var/lib/nfs/ganesha", "/var/log/ganesha", "/tmp", "/etc/ganesha")
# In memory, bounded, and gone with the gateway: it never stops speaking, and a guest can make it speak.
_LOG = "/var/log/ganesha/log"
_DEVICES = ("/dev/null", "/dev/urandom")


def main() -> None:
    """Serve until the server ends."""
    told = json.loads(sys.stdin.buffer.read())
    try:
        share = nfs_source.share(told)
        _own_root(share, told["place"])
        Path("/ganesha.conf").write_text(told["config"])
        child, listener = _start(sys.argv[1], told["place"], bool(told["read_only"]))
        calls.keep_capabilities((_DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER, _KILL, _SYS_PTRACE))
        opener = nfs_handles.Opener(child, listener, told["place"])
        problem = _until_it_listens(child, opener, told["port"])
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
    opener.answer()


def _own_root(share: int, place: str) -> None:
    """A root of our own: the share, what programs need to run, and nothing of the host besides. Raises OSError."""
    links = {path: os.readlink(path) for path in _SYSTEM if os.path.islink(path)}
    trees = {path: calls.clone(path) for path in (*_SYSTEM, "/proc") if path not in links and os.path.isdir(path)}
    files = {path: Path(path).read_bytes() for path in _FILES if os.path.exists(path)}
    devices = {path: calls.clone(path) for path in _DEVICES}
    calls.unshare_mounts()
    calls.checked(calls.libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    calls.checked(calls.libc.mount(b"none", _ROOT.encode(), b"tmpfs", 0, b"mode=755,size=16m"))
    # The share comes first: of several mounts of one file system ganesha takes the first for the file system's own.
    for path, tree in {place: share, **trees}.items():
        os.makedirs(_ROOT + path, exist_ok=True)
        calls.attach(tree, _ROOT + path)
    os.makedirs(f"{_ROOT}/dev")
    os.makedirs(f"{_ROOT}/etc")
    for path, tree in devices.items():
        Path(_ROOT + path).touch()
        calls.attach(tree, _ROOT + path)
    for path, data in files.items():
        Path(_ROOT + path).write_bytes(data)
    for path, target in links.items():
        os.symlink(target, _ROOT + path)
    for path in _OWN:
        os.makedirs(_ROOT + path, mode=0o700)
    os.symlink("/run", f"{_ROOT}/var/run")
    os.symlink("/proc/self/mounts", f"{_ROOT}/etc/mtab")
    calls.change_root(_ROOT)


def _start(name: str, place: str, read_only: bool) -> tuple[int, int]:
    """The server's pid, and the fd by which it asks about handles. Raises OSError."""
    rules = [(path, confine.READ_AND_RUN) for path in _SYSTEM]
    rules += [("/", confine.READ_DIR), ("/proc", confine.READ), ("/etc", confine.READ), ("/ganesha.conf", confine.READ)]
    rules += [(path, confine.READ_FILE | confine.WRITE_FILE) for path in _DEVICES]
    rules += [(path, confine.ALL_BUT_RUN) for path in _OWN]
    rules.append((place, confine.READ if read_only else confine.ALL_BUT_RUN))
    # It opens sockets of its own, which a full ruleset forbids.
    ruleset = confine.make_ruleset(rules, files_only=True)
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            os.setsid()
            calls.die_with_parent()
            _drop_capabilities()
            confine.restriction(ruleset)()
            os.dup2(os.open(_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
            socket.send_fds(theirs, [b"."], [nfs_handles.listen()])
            if os.getppid() == parent:
                files = ["-f", "/ganesha.conf", "-L", _LOG, "-p", f"/run/ganesha/{name}.pid"]
                os.execve(
                    SERVER, [SERVER, "-F", "-N", "NIV_CRIT", *files], {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
                )
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
        if number not in _KEPT and calls.libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) < 0:
            break  # there are no more


def _until_it_listens(child: int, opener: nfs_handles.Opener, port: int) -> str:
    """'' once it does, else why not."""
    deadline = time.monotonic() + _LISTEN_S
    while time.monotonic() < deadline:
        opener.answer(0.02)
        if os.waitpid(child, os.WNOHANG)[0]:
            return "ganesha ended at once: its words are in wnodesd's log"
        if _listens(child, port):
            # It serves, though nothing, also without an export that it does not like.
            return "" if _has_open(child, opener.share) else "ganesha does not serve this file system"
    return f"ganesha does not listen after {_LISTEN_S:.0f} s"


def _has_open(child: int, path: str) -> bool:
    folder = f"/proc/{child}/fd"
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # it was closed meanwhile
            if os.readlink(f"{folder}/{name}") == path:
                return True
    return False


def _listens(child: int, port: int) -> bool:
    for name in ("tcp", "tcp6"):
        with suppress(OSError), open(f"/proc/{child}/net/{name}", encoding="ascii") as file:
            rows = [line.split()[1:4] for line in file]
            if any(row[0].endswith(f":{port:04X}") and row[2] == "0A" for row in rows[1:]):
                return True
    return False


if __name__ == "__main__":
    main()
