"""What hypervisor this host has, as one short text that changes whenever a saved guest might not load."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

LIBVIRTS = ("/usr/lib/*-linux-gnu/libvirt.so.0", "/usr/lib64/libvirt.so.0")
QEMUS = ("/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm")  # as in qemu_x86_64.sh
_CPU = re.compile(r"(?m)^(?:vendor_id|model name|microcode|flags)\s*:.*$")


def description(accel: str) -> str | None:
    """QEMU's file (an upgrade brings another inode, time or size); under KVM the kernel and the processor too.

    No program is run: this is asked at each start. None where there is no QEMU.
    """
    for path in QEMUS:
        with suppress(OSError):
            found = os.stat(path)
            return " ".join((path, str(found.st_ino), str(found.st_size), str(found.st_mtime_ns), accel, *_kvm(accel)))
    return None


def installed() -> str:
    """A text that changes when QEMU or libvirt is another installation; '' where that cannot be told."""
    libvirt = next((found for pattern in LIBVIRTS for found in glob.glob(pattern)), "")
    qemu = description("")
    if not (libvirt and qemu):
        return ""
    found = os.stat(libvirt)
    return f"{qemu} {os.path.realpath(libvirt)} {found.st_ino} {found.st_size} {found.st_mtime_ns}"


def _kvm(accel: str) -> tuple[str, ...]:
    if accel != "kvm":
        return ()
    # The first processor's lines: all of a node's are alike, and there may be hundreds.
    lines = "\n".join(dict.fromkeys(_CPU.findall(Path("/proc/cpuinfo").read_text()[:16384])))
    return os.uname().release, hashlib.sha256(lines.encode()).hexdigest()[:16]
