"""What this host can run, proved and not guessed.

``/dev/kvm`` may exist, open and answer every question, and still never run a guest's first
instruction (nested virtualisation that is half there: the guest hangs without an error, or QEMU
aborts), or run every instruction of a guest's kernel in software, a hundred times slower than TCG
(kvm-pvm without a processor's help). So a guest is run under it, once a boot and QEMU version: the
machine's own BIOS, then a boot sector that enters long mode and counts. Each of these was seen to be the
one thing that fails: the BIOS where instructions at the reset vector ran well, the count after both.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from wnodes_core.api import errors
from wnodes_core.backends.libvirt import domain, host, memory
from wnodes_core.tools import private_folder, remove_tree, run, write_atomic

DEADLINE_S = 5.0  # TCG itself needs 0.5 to 2 s
_SAYS = b"WNODES-OK\n"
_DISK_BYTES = 4 << 20  # the BIOS reads no disk smaller than a cylinder
# A processor counts this far in 30 ms, TCG in 0.15 s; emulated one by one, 64 Mi take a minute.
_COUNT = 64 << 20
_VERSIONS_NAME = "versions-1.json"
_MEMORY_NAME = "kvm-2.json"  # of the probe's second form: what the first one found is not asked


def probe(accel: str, folder: str, *, arch: str = "x86_64", device: str = "/dev/kvm") -> dict[str, Any]:
    """Say which accelerator works here, and the versions of QEMU and libvirt.

    Raises NoKvm if ``accel`` is ``kvm`` and no guest runs under it, LibvirtDown, SettingsError.
    """
    if accel not in ("kvm", "tcg", "auto"):
        raise errors.SettingsError(f"accel {accel!r}: want kvm, tcg or auto")
    state_dir = state_dir_of(folder)
    facts = _versions(folder, arch, state_dir)
    if accel == "tcg":
        return {"accel": "tcg", "notice": "", **facts}
    problem = _kvm_problem(folder, arch, device, facts["qemu"], state_dir)
    if not problem:
        return {"accel": "kvm", "notice": "", **facts}
    if accel == "kvm":
        raise errors.NoKvm(f"KVM is demanded (accel: kvm), but {problem}", hint="accel: auto falls back to TCG")
    return {"accel": "tcg", "notice": f"no KVM, the VM is emulated and slow: {problem}", **facts}


def state_dir_of(folder: str) -> str:
    """The state folder that a lease's folder lies in (``STATE_DIR/leases/ID``), as a candidate for ``memory``."""
    parent = Path(folder).parent
    return str(parent.parent) if parent.name == "leases" else memory.STATE_DIR


def boot_sector() -> bytes:
    """A boot sector that enters long mode, counts down, says so on the first serial port and resets."""
    code = b"\xfa\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0"  # cli; ds = es = ss = 0
    code += b"\xbf\x00\x10\x66\x31\xc0\xb9\x00\x0c\x66\xf3\xab"  # clear three pages from 0x1000 on
    for table, entry in ((0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x0083)):  # the first 2 MiB, identity
        code += b"\xc7\x06" + table.to_bytes(2, "little") + entry.to_bytes(2, "little")
    code += b"\x66\xb8\x00\x10\x00\x00\x0f\x22\xd8"  # cr3 = 0x1000
    code += b"\x0f\x20\xe0\x0c\x20\x0f\x22\xe0"  # cr4 |= PAE
    code += b"\x66\xb9\x80\x00\x00\xc0\x0f\x32\x80\xcc\x01\x0f\x30"  # EFER |= LME
    code += b"\x0f\x01\x16" + _at(0x8B)  # lgdt
    code += b"\x0f\x20\xc0\x66\x0d\x01\x00\x00\x80\x0f\x22\xc0"  # cr0 |= PG | PE
    code += b"\xea" + _at(0x5B) + b"\x08\x00"  # jump to the next instruction, now of 64 bits
    code += b"\xb9" + _COUNT.to_bytes(4, "little") + b"\xff\xc9\x75\xfc"  # count down
    code += b"\x66\xba\xf8\x03\xbe" + _at(0x91) + b"\0\0\xb9" + len(_SAYS).to_bytes(4, "little") + b"\xf3\x6e"
    code += b"\xb0\xfe\xe6\x64"  # mov al, 0xfe; out 0x64, al: the keyboard controller's reset line
    code += b"\xf4\xeb\xfd"  # hlt; jmp back to it
    code = code.ljust(0x83, b"\0") + (0x00209A0000000000).to_bytes(8, "little")  # GDT: code of 64 bits
    code += (15).to_bytes(2, "little") + _at(0x7B) + b"\0\0" + _SAYS
    return code.ljust(510, b"\0") + b"\x55\xaa"


def _at(offset: int) -> bytes:
    """An address in the boot sector, which a BIOS loads to 0x7c00."""
    return (0x7C00 + offset).to_bytes(2, "little")


def _kvm_problem(folder: str, arch: str, device: str, qemu: str, state_dir: str) -> str:
    """Why KVM does not work for this user, or '' if it does."""
    if not os.path.exists(device):
        return f"{device} does not exist"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} may not be opened by uid {os.getuid()}"
    if os.getuid() == 0 and not _is_for_users(os.stat(device)):
        return f"{device} may be opened by root alone, and VMs run as the jobs' users"
    key = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {qemu} {arch}"
    known = _recall(key, state_dir)
    if known is not None:
        return known
    problem = run_guest("kvm", folder, arch)
    memory.remember(_MEMORY_NAME, json.dumps({"key": key, "problem": problem}).encode(), state_dir)
    return problem


def _is_for_users(device: os.stat_result) -> bool:
    """Whether others, or a group that is not root's, may use the device."""
    return device.st_mode & 0o006 == 0o006 or (device.st_gid != 0 and device.st_mode & 0o060 == 0o060)


def _recall(key: str, state_dir: str) -> str | None:
    known = _remembered(_MEMORY_NAME, state_dir)
    return str(known["problem"]) if known.get("key") == key else None


def run_guest(accel: str, folder: str, arch: str = "x86_64") -> str:
    """Run the probe guest under ``accel``: '' if it spoke and ended, else what happened."""
    # QEMU by hand and not through libvirt: this is a test of the processor, no job's VM. It must
    # be short, killable, and free of libvirt's own beliefs on KVM.
    disk = Path(folder) / f"probe-{os.getpid()}.img"
    write_atomic(disk, boot_sector(), mode=0o600)
    os.truncate(disk, _DISK_BYTES)
    model = "host" if accel == "kvm" else "max"
    try:
        done = run(
            [domain.emulator(arch), "-machine", f"q35,accel={accel}", "-cpu", model, "-m", "64", "-nodefaults"]
            + ["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]
            + ["-blockdev", json.dumps({"driver": "file", "filename": str(disk), "node-name": "disk"})]
            + ["-device", "virtio-blk-pci,drive=disk,bootindex=0"],
            timeout_s=DEADLINE_S,
            check=False,
        )
    except errors.CommandError as error:
        why = error.stderr_tail.strip() or "it never said that it had counted to the end"
        return f"a probe guest hung under {accel} for {DEADLINE_S:g} s: {why}"
    finally:
        disk.unlink(missing_ok=True)
    if done.exit_code == 0 and done.stdout == _SAYS:
        return ""
    why = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[0]
    return f"a probe guest did not run under {accel} (exit code {done.exit_code}): {why}"


def _versions(folder: str, arch: str, state_dir: str) -> dict[str, str]:
    """What QEMU and libvirt call themselves; asked once for each installation of them, which takes 0.1 s."""
    key = host.installed()
    known = _remembered(_VERSIONS_NAME, state_dir)
    if key and known.get("key") == key:
        return {name: str(known[name]) for name in ("qemu", "libvirt")}
    facts = {"qemu": _qemu_version(arch), "libvirt": _libvirt(folder, arch, state_dir)}
    memory.remember(_VERSIONS_NAME, json.dumps({"key": key, **facts}).encode(), state_dir)
    return facts


def _remembered(name: str, state_dir: str) -> dict[str, Any]:
    try:
        known = json.loads(memory.recall(name, state_dir) or b"{}")
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def _qemu_version(arch: str) -> str:
    try:
        text = run([domain.emulator(arch), "--version"], timeout_s=20).text
    except errors.CommandError as error:
        raise errors.LibvirtDown(f"QEMU does not start: {error.stderr_tail}", hint="install qemu-system-x86") from error
    match = re.search(r"version (\S+)", text)
    return match[1] if match else text[:40]


def _libvirt(folder: str, arch: str, state_dir: str) -> str:
    """libvirt's version; on the way its view of QEMU is warmed, so that no job waits for that."""
    # In a process of its own: the caller may be wnodesd, which carries no libvirt.
    program = [sys.executable, "-I", "-m", "wnodes_core.backends.libvirt.embed"]
    root = private_folder(Path(folder) / f"probe-{os.getpid()}")
    try:
        done = run([*program, str(root), domain.emulator(arch), arch, state_dir], timeout_s=120, check=False)
    finally:
        remove_tree(root)
    version = done.text.strip()
    # As root the driver needs an account that only a package makes (see embed.py). Jobs are
    # users' and do not care, so this proves nothing against the host.
    if not version or (done.exit_code and os.getuid() != 0):
        raise errors.LibvirtDown(f"libvirt does not start: {done.stderr.decode(errors='replace').strip()[-400:]}")
    return version
