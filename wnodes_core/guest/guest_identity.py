"""Who this guest is, and becoming somebody else: a clone's waking. Part of the agent.

A clone is its template to the last bit. What makes the guest this one is looked up once, at rest, so
that waking costs an emulated guest milliseconds: it writes a few files that are known by then. What
a template must not hand on (host keys, leases) is removed at rest already.
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import binascii
import fcntl
import os
import struct
import sys
import time
from typing import Any

from wnodes_core.guest import guest_users

BOOT_ID = "/proc/sys/kernel/random/boot_id"
_COVER = "/run/wnodes/boot_id"
_MACHINE_IDS = ("/etc/machine-id", "/var/lib/dbus/machine-id")
_SEEDS = (
    "/var/lib/systemd/random-seed",
    "/var/lib/urandom/random-seed",
    "/var/lib/misc/random-seed",
    "/var/lib/seedrng",
)
_LEASES = (
    "/run/systemd/netif/leases",
    "/var/lib/dhcp",
    "/var/lib/dhclient",
    "/var/lib/dhcpcd",
    "/var/lib/NetworkManager",
)
_CLOUD = "/var/lib/cloud"
_CLOUD_FILES = (
    "/var/lib/cloud/data/instance-id",
    "/run/cloud-init/.instance-id",
    "/run/cloud-init/instance-data.json",
    "/run/cloud-init/instance-data-sensitive.json",
)
_SSH = "/etc/ssh"
_SEED_BYTES = 512
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h


class Identity:
    """What makes this guest itself. ``root`` is '' in a guest and a folder in tests."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._boot_id = root + BOOT_ID
        self._machine_ids: list[str] = []
        self._seeds: list[str] = []
        self._leases: list[str] = []
        self._host_name = ""  # the file, if there is one
        self._ssh = False
        self._cloud = ""  # cloud-init's id of this instance

    def look(self) -> dict[str, str]:
        """Find what this image has of it; returns who the guest is now."""
        for path in _MACHINE_IDS:
            # dbus's is mostly a link to the other one. An image without either gets the first.
            if not os.path.islink(self.root + path) and (os.path.exists(self.root + path) or path == _MACHINE_IDS[0]):
                self._machine_ids.append(self.root + path)
        self._seeds = [path for name in _SEEDS for path in _files(self.root + name)]
        self._leases = [path for name in _LEASES for path in _files(self.root + name)]
        self._host_name = self.root + "/etc/hostname" if os.path.exists(self.root + "/etc/hostname") else ""
        self._ssh = os.path.isdir(self.root + _SSH)
        self._cloud = guest_users.read(self.root + _CLOUD_FILES[0]).strip()
        return self.tell()

    def tell(self) -> dict[str, str]:
        """Who this guest says it is."""
        return {
            "machine_id": guest_users.read(self._machine_ids[0]).strip(),
            "boot_id": guest_users.read(self._boot_id).strip(),
            "host_name": guest_users.read(self._host_name).strip() if self.root else os.uname().nodename,
            "ssh_host_keys": _digest(self._host_keys()) if self._ssh else "",
            "random_seed": _digest(self._seeds),
            "random": binascii.hexlify(os.getrandom(32)).decode("ascii"),
            "leases": _digest(self._leases),
            "instance_id": guest_users.read(self.root + _CLOUD_FILES[0]).strip() if self._cloud else "",
        }

    def part(self) -> list[str]:
        """Remove what no clone may find; the types of the host keys among it, the quickest to make anew first.

        Raises OSError.
        """
        keys = self._host_keys() if self._ssh else []
        for path in keys + self._leases:
            os.unlink(path)
        kinds = [os.path.basename(path)[len("ssh_host_") : -len("_key")] for path in keys if path.endswith("_key")]
        return sorted(kind for kind in kinds if kind.isalnum())

    def cover_boot_id(self, mount: Any) -> None:
        """Put a file in the place of the kernel's boot id, which nothing can write.

        A job that mounts a procfs of its own still sees the kernel's, which is the template's.
        """
        if self.root:
            return
        own = guest_users.read(BOOT_ID)
        os.makedirs(os.path.dirname(_COVER), 0o755, exist_ok=True)
        guest_users.write(_COVER, own)
        os.chmod(_COVER, 0o444)
        mount(["mount", "--bind", _COVER, BOOT_ID])
        self._boot_id = _COVER
        guest_users.write(_COVER, own.upper())
        if guest_users.read(BOOT_ID) != own.upper():
            raise OSError("boot id: a file mounted on %s does not show there" % BOOT_ID)
        guest_users.write(_COVER, own)

    def become(self, asked: dict[str, Any]) -> dict[str, float]:
        """Be what ``asked`` says: milliseconds of each step. Raises OSError, ValueError."""
        steps = (
            ("entropy", self._stir, asked["entropy"]),
            ("clock", self._set_clock, asked["clock"]),
            ("host_name", self._set_host_name, asked["host_name"]),
            ("machine_id", self._set_machine_id, asked["machine_id"]),
            ("boot_id", self._set_boot_id, asked["boot_id"]),
            ("files", self._renew_files, asked["machine_id"]),
        )
        took = {}
        for name, step, value in steps:
            began = time.perf_counter()
            step(value)
            took[name] = round((time.perf_counter() - began) * 1000, 2)
        return took

    def _stir(self, entropy: str) -> None:
        """Make the kernel's random numbers other than those of every sibling, at once."""
        data = binascii.unhexlify(entropy)
        fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
        try:
            if self.root:
                os.write(fd, data)
            else:
                # Mixed in and counted; the generator would otherwise read it within minutes only.
                fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", 8 * len(data), len(data)) + data)
                fcntl.ioctl(fd, _RNDRESEEDCRNG)
        finally:
            os.close(fd)
        if "random" in sys.modules:
            sys.modules["random"].seed(os.getrandom(32))

    def _set_clock(self, clock: float) -> None:
        if not self.root:
            guest_users.set_clock(clock)

    def _set_host_name(self, name: str) -> None:
        if self._host_name:
            guest_users.write(self._host_name, name + "\n")
        if not self.root:
            guest_users.set_host_name(name, "/etc")

    def _set_machine_id(self, machine_id: str) -> None:
        for path in self._machine_ids:
            guest_users.write(path, machine_id + "\n")  # in place: systemd may have mounted a file of its own there

    def _set_boot_id(self, boot_id: str) -> None:
        guest_users.write(self._boot_id, boot_id + "\n")

    def _renew_files(self, machine_id: str) -> None:
        for path in self._seeds:
            guest_users.write(path, os.getrandom(_SEED_BYTES))
        if self._cloud:
            self._rename_instance("i-" + machine_id)

    def _rename_instance(self, new: str) -> None:
        """Let cloud-init's records name another instance; it does not run again by that."""
        old, self._cloud = self._cloud, new
        for path in _CLOUD_FILES:
            text = guest_users.read(self.root + path)
            if old in text:
                guest_users.write(self.root + path, text.replace(old, new))
        folder, link = self.root + _CLOUD + "/instances/", self.root + _CLOUD + "/instance"
        if os.path.isdir(folder + old) and os.path.islink(link):
            os.rename(folder + old, folder + new)
            os.unlink(link)
            os.symlink(_CLOUD + "/instances/" + new, link)

    def _host_keys(self) -> list[str]:
        return [path for path in _files(self.root + _SSH) if os.path.basename(path).startswith("ssh_host_")]


def _files(path: str) -> list[str]:
    """The files in a folder, or the file itself, if it is there."""
    try:
        names = os.listdir(path)
    except NotADirectoryError:
        return [path]
    except OSError:
        return []
    return [path + "/" + name for name in sorted(names) if os.path.isfile(path + "/" + name)]


def _digest(paths: list[str]) -> str:
    """One digest over these files, '' if there are none."""
    import hashlib  # half the modules of OpenSSL's wrapper: only where there is something to digest

    total, found = hashlib.sha256(), False
    for path in paths:
        try:
            with open(path, "rb") as file:
                total.update(path.encode() + b"\0" + file.read(1 << 20) + b"\0")
            found = True
        except FileNotFoundError:
            pass
    return total.hexdigest() if found else ""
