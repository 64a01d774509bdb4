"""The guest's identity: users and groups, host name, clock, loopback. Part of the agent.

Lines are appended to passwd and group as they are: ``useradd`` takes a second under TCG.
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import time
from typing import Any

VERSION = 1  # of the agent's verbs
_SIOCSIFFLAGS, _SIOCGIFFLAGS, _IFF_UP = 0x8914, 0x8913, 1


def read(path: str) -> str:
    """A file's text, '' if there is none. Python's own text layer costs an emulated guest more than the reading."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        pieces = [os.read(fd, 65536)]
        while pieces[-1]:
            pieces.append(os.read(fd, 65536))
        return b"".join(pieces).decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)


def write(path: str, content: Any) -> None:
    """Change a file in place, for somebody may have mounted it there; text or bytes.

    It is not emptied first: ext4 writes a file that was to the disk as soon as it is closed.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(fd).st_size
        os.write(fd, data)
        if size > len(data):
            os.ftruncate(fd, len(data))
    finally:
        os.close(fd)


def _put_line(path: str, name: str, number: int, line: str) -> None:
    """Make ``line`` the only one for its name and number; other lines stay as they are."""
    kept = []
    for old in read(path).splitlines():
        fields = old.split(":")
        if old == line:
            return
        if fields[0] == name or (len(fields) > 2 and fields[2] == str(number) and number):
            continue
        kept.append(old)
    text = "\n".join(kept + [line]) + "\n"
    temporary = path + ".wnodes"
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.rename(temporary, path)


def _plain(text: str) -> str:
    """A field of passwd: a colon or a newline in it would forge another."""
    if ":" in text or "\n" in text or "\0" in text:
        raise ValueError("%r: no colon, newline or NUL wanted" % text)
    return text


def add_user(user: dict[str, Any], groups: list[dict[str, Any]], etc: str) -> None:
    """Create (or agree with) the groups and the user, with exact ids.

    A name or an id that the image already uses for another is taken over: the job's ids decide.
    """
    for group in groups:
        members = _plain(user["name"]) if user and group["gid"] != user["gid"] else ""
        for old in read(etc + "/group").splitlines():
            if old.startswith("%s:x:%d:" % (group["name"], group["gid"])):  # another account may be in it
                members = ",".join(dict.fromkeys(filter(None, old.split(":")[3].split(",") + [members])))
        line = "%s:x:%d:%s" % (_plain(group["name"]), group["gid"], members)
        _put_line(etc + "/group", group["name"], group["gid"], line)
    if not user or user["uid"] == 0:
        return
    shell = user.get("shell") or "/bin/sh"
    shell = shell if os.access(shell, os.X_OK) else "/bin/sh"
    fields = (_plain(user["name"]), user["uid"], user["gid"], _plain(user["home"]), _plain(shell))
    _put_line(etc + "/passwd", user["name"], user["uid"], "%s:x:%d:%d::%s:%s" % fields)


def make_home(user: dict[str, Any], root: str) -> None:
    """An empty home folder, in case no mount brings the real one."""
    path = root + user["home"]
    if user["home"] not in ("", "/") and not os.path.isdir(path):
        os.makedirs(path, 0o755, exist_ok=True)
        os.chmod(path, 0o700)
        os.chown(path, user["uid"], user["gid"])


def set_host_name(name: str, etc: str) -> None:
    """Set the kernel's host name and let it resolve without a network."""
    socket.sethostname(name)
    _put_line_hosts(etc + "/hosts", "127.0.1.1 " + _plain(name))


def _put_line_hosts(path: str, line: str) -> None:
    """Make ``line`` the only one of 127.0.1.1: no guest answers to the name it had before."""
    old = read(path).splitlines() or ["127.0.0.1 localhost"]
    lines = [each for each in old if each.split()[:1] != ["127.0.1.1"]] + [line]
    if lines != old:
        write(path, "\n".join(lines) + "\n")


def set_clock(seconds: float) -> None:
    """Set the clock to the host's; small differences are left alone."""
    if abs(time.time() - seconds) > 0.05:
        time.clock_settime(time.CLOCK_REALTIME, seconds)


def loopback_up() -> None:
    """``ip link set lo up``; the kernel adds 127.0.0.1 itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        flags = struct.unpack("16sh", fcntl.ioctl(probe, _SIOCGIFFLAGS, struct.pack("16sh", b"lo", 0)))[1]
        if not flags & _IFF_UP:
            fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | _IFF_UP))


def may_load(modules: str, *wanted: str) -> bool:
    """Whether the kernel's modules have all of these; where there are none to be seen, only a mount would tell."""
    if not os.path.isdir(modules):
        return True
    try:
        for path in wanted:
            folder, name = os.path.split(modules + "/kernel/" + path)
            if not any(found.startswith(name + ".ko") for found in os.listdir(folder)):
                return False
    except OSError:
        return False
    return True


def facts() -> dict[str, Any]:
    """What the host wants to know of this guest."""
    release = os.uname()
    path = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")
    sshfs = [folder + "/sshfs" for folder in path if os.access(folder + "/sshfs", os.X_OK)]
    memory = [line.split()[1] for line in read("/proc/meminfo").splitlines() if line.startswith("MemTotal")]
    filesystems = read("/proc/filesystems").split()
    modules = "/lib/modules/" + release.release
    return {
        "kernel": release.release,
        "machine": release.machine,
        "host_name": release.nodename,
        "boot_id": read("/proc/sys/kernel/random/boot_id").strip(),
        "uptime_s": float((read("/proc/uptime").split() or ["0"])[0]),
        "memory_kib": int(memory[0]) if memory else 0,
        "cpus": os.cpu_count() or 0,
        "sshfs": bool(sshfs),
        # Asking the program itself would cost an emulated guest 60 ms.
        "sshfs_contains_symlinks": bool(sshfs) and "no_contain_symlinks" in read(sshfs[0]),
        "fuse": "fuse" in filesystems or os.path.exists("/dev/fuse"),
        "virtiofs": "virtiofs" in filesystems or may_load(modules, "fs/fuse/virtiofs"),
        "nfs": "nfs4" in filesystems or may_load(modules, "fs/nfs/nfsv4"),
        "9p": "9p" in filesystems or may_load(modules, "fs/9p/9p", "net/9p/9pnet_virtio"),
        "version": VERSION,
        "python": "%d.%d.%d" % sys.version_info[:3],
        "pid": os.getpid(),
    }
