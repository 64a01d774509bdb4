"""Templates of a real guest and their clones, both ways: the contract, and what only a real guest can show."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import mmap
import os
import pwd
import select
import shutil
import stat
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import plugging
from wnodes_core.api import Boot, Disk, Nic, Process, Route, Template, Vm
from wnodes_core.backends.libvirt import clone, plugin
from wnodes_core.guest import identity
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.images import disks
from wnodes_core.mounting import SHOW_SCRATCH
from wnodes_core.storage import scratch
from wnodes_core.testing.template import TemplateContract
from wnodes_core.testing.template_stage import digests, tell
from wnodes_core.tools import open_pidfd, run

IMAGE = Path(os.environ.get("WNODES_WORK", "/var/lib/wnodes-work"), "images/minimal")
MOST_MIB = 1024
pytestmark = pytest.mark.guest


class RealGuest(TemplateContract):
    __test__ = False
    backend = "wnodes_core.backends.libvirt.plugin"

    @classmethod
    def make_vm(cls, folder: Path) -> Vm:
        """The small Debian guest that scripts/build-image makes."""
        assert (IMAGE / "disk.qcow2").exists(), f"{IMAGE}: no image, run scripts/build-image {IMAGE} --kind minimal"
        disk = Disk(f"{folder}/overlay.qcow2", "qcow2", str(IMAGE / "disk.qcow2"), "qcow2", serial="root")
        disks.wnodes_disk_create(disk=disk)
        boot = Boot(str(IMAGE / "vmlinuz"), str(IMAGE / "initrd"), "root=/dev/vda rw quiet")
        return replace(super().make_vm(folder), memory_mib=384, most_mib=MOST_MIB, disks=(disk,), boot=boot)

    @classmethod
    def make_clone(cls, template: Template, folder: Path) -> Vm:
        vm = super().make_clone(template, folder)
        base = template.disks[0]
        path = f"{vm.folder}/overlay.qcow2"
        blank = f"{vm.folder}/blank"
        disks.blank_for(base.path, blank)
        disk = Disk(path, "qcow2", base.path, base.format, False, "root", base.base, base.base_format, blank)
        disks.wnodes_disk_create(disk=disk)
        return replace(vm, disks=(disk,))

    async def apart(self, one: GuestChannel, two: GuestChannel) -> None:
        """A file on the disk and one in memory, of the same name in both."""
        for channel, word in ((one, "one"), (two, "two")):
            done = await channel.run(["sh", "-c", f"echo {word} >/root/who; echo {word} >/dev/shm/who; sync"])
            assert done.code == 0, done.stderr
        for channel, word in ((one, "one"), (two, "two")):
            done = await channel.run(["sh", "-c", "echo 3 >/proc/sys/vm/drop_caches; cat /root/who /dev/shm/who"])
            assert done.stdout.split() == [word.encode()] * 2

    @pytest.mark.parametrize("key", ["o", "b", "c"])
    def test_a_guest_that_ends_ends_its_qemu(self, vm: Vm, template: Template, key: str) -> None:
        """Power off, reset, panic; by sysrq, which waits for nobody."""

        async def end() -> None:
            async with self.woken(vm, template) as (_, process, channel):
                asyncio.ensure_future(channel.run(["sh", "-c", f"echo {key} >/proc/sysrq-trigger"])).add_done_callback(
                    lambda done: done.cancelled() or done.exception()
                )
                await asyncio.wait_for(channel.lost, self.answer_s)
                await asyncio.to_thread(_await_end, process)

        asyncio.run(end())

    def test_a_guest_that_cannot_grow_is_cloned_on_the_same_machine(self, vm: Vm, template: Template) -> None:
        """Its template's shape says so, though the machine has the device."""
        fixed = replace(template, shape=replace(template.shape, most_mib=0))

        async def wake() -> None:
            async with self.woken(replace(vm, most_mib=0), fixed) as (_, _, channel):
                await channel.request("ping", timeout_s=self.answer_s)

        asyncio.run(wake())

    def test_a_nic_is_plugged_with_a_mac_of_the_clone_s_own(self, vm: Vm, template: Template) -> None:
        """And the guest set up, with no help of the image's; the machine has a slot for it."""
        nic = Nic("user", "02:00:00:00:00:07", addresses=("10.0.2.15/24",), routes=(Route("0.0.0.0/0", "10.0.2.2"),))

        async def join() -> None:
            async with self.woken(vm, template) as (starter, _, channel):
                assert await asyncio.to_thread(tell, starter, f"plug {json.dumps(nic.to_dict())}")
                await plugging.settle(channel, nic, "user")
                told = (await channel.run(["sh", "-c", "ip addr; ip route"])).stdout.decode()
                assert nic.mac in told and "10.0.2.15/24" in told and "default via 10.0.2.2" in told

        asyncio.run(join())

    @pytest.mark.parametrize("form", ["raw", "qcow2", "block"])
    def test_a_scratch_disk_is_plugged_beside_a_nic(
        self, vm: Vm, template: Template, form: str, request: pytest.FixtureRequest
    ) -> None:
        """The machine has slots for both; a full disk is the guest's ENOSPC."""
        disk = Disk(f"{vm.folder}/scratch.{form}", form, serial="scratch", size_mib=64)
        if form == "block":
            disk = replace(disk, path=_loop_node(vm.folder, request), format="raw", block=True)
        scratch.wnodes_disk_create(disk=disk)
        nic = Nic("user", "02:00:00:00:00:07")

        async def fill() -> None:
            async with self.woken(vm, template) as (starter, _, channel):
                assert await asyncio.to_thread(tell, starter, f"plug {json.dumps(nic.to_dict())}")
                assert await asyncio.to_thread(tell, starter, f"disk {json.dumps(asdict(disk))}")
                done = await channel.run(["sh", "-c", SHOW_SCRATCH, "scratch", "/tmp"])
                assert done.code == 0, done.stderr
                done = await channel.run(["sh", "-c", "head -c 30M /dev/zero >/tmp/a; sync; head -c 60M /dev/zero >/tmp/b"])
                assert done.code and b"No space left" in done.stderr, done

        asyncio.run(fill())

    def test_more_memory_is_plugged(self, vm: Vm, template: Template) -> None:
        assert template.shape.most_mib == MOST_MIB, "the image's guest cannot grow: build it anew"
        wanted = 768

        async def grow() -> None:
            async with self.woken(replace(vm, memory_mib=wanted), template) as (_, _, channel):
                total = 0
                for _ in range(50):
                    done = await channel.run(["grep", "MemTotal", "/proc/meminfo"])
                    total = int(done.stdout.split()[1]) >> 10
                    if total > wanted * 0.85:
                        return
                    await asyncio.sleep(0.1)
                raise AssertionError(f"{total} MiB after 5 s: want about {wanted}")

        asyncio.run(grow())


class TestMapped(RealGuest):
    __test__ = True
    way = "mapped"

    def test_a_sealed_memfd_of_root_is_cloned_by_another_user_and_stays_as_it_is(
        self, template: Template, ordinary_user: pwd.struct_passwd, tmp_path: Path
    ) -> None:
        """So wnodesd hands a template to a job: QEMU 7.2 opens memory for writing, and the seals refuse that."""
        fd = _sealed(Path(template.memory))
        shared = _opened_to_all(template, tmp_path)
        handed = replace(shared, memory=f"/proc/self/fd/{fd}")
        folder = tmp_path / "c"
        folder.mkdir(mode=0o755)
        vm = self.make_clone(handed, folder)
        for path in (Path(vm.folder), *Path(vm.folder).iterdir()):
            os.chown(path, ordinary_user.pw_uid, ordinary_user.pw_gid)
        before = digests(replace(handed, memory=f"/proc/{os.getpid()}/fd/{fd}"))
        try:
            _as_user(ordinary_user, lambda: _clone_and_attack(vm, handed, fd))
        finally:
            assert plugin.wnodes_vm_stop(vm=vm)
        assert digests(replace(handed, memory=f"/proc/{os.getpid()}/fd/{fd}")) == before
        os.close(fd)

    def test_memory_of_another_size_is_refused_before_qemu_starts(self, vm: Vm, template: Template) -> None:
        error = self.refused(vm, replace(template, shape=replace(template.shape, memory_mib=385)))
        assert "want 403701760" in str(error)
        assert not Path(vm.folder, clone.LOG).exists()

    def test_a_program_that_is_no_qemu_is_never_run(self, vm: Vm, template: Template, tmp_path: Path) -> None:
        folder = tmp_path / "forged"
        folder.mkdir()
        for name in template.files.values():
            shutil.copy(Path(template.folder, name), folder)
        mark, program = tmp_path / "mark", tmp_path / "qemu-system-x86_64"
        program.write_text(f"#!/bin/sh\ntouch {mark}\n")
        program.chmod(0o755)
        words = json.loads((folder / "argv.json").read_text())
        (folder / "argv.json").write_text(json.dumps([str(program), *words[1:]]))
        assert f"program '{program}'" in str(self.refused(vm, replace(template, folder=str(folder))))
        assert not mark.exists()


class TestSaved(RealGuest):
    __test__ = True
    way = "saved"


def _loop_node(folder: str, request: pytest.FixtureRequest) -> str:
    """A node, outside /dev's own, for a loop device of 64 MiB: what wnodesd makes for a volume."""
    file, node = f"{folder}/loop.img", f"/dev/wnodes-test-{os.getpid()}"
    with open(file, "wb") as image:
        image.truncate(64 << 20)
    loop = run(["losetup", "--find", "--show", file]).text.strip()
    request.addfinalizer(lambda: run(["losetup", "--detach", loop]))
    os.mknod(node, stat.S_IFBLK | 0o600, os.stat(loop).st_rdev)
    request.addfinalizer(lambda: os.unlink(node))
    return node


def _await_end(process: Process) -> None:
    fd = open_pidfd(process)
    if fd is None:
        return
    try:
        assert select.select([fd], [], [], 10)[0], "QEMU outlived its guest"
    finally:
        os.close(fd)


def _sealed(memory: Path) -> int:
    fd = os.memfd_create("template", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(memory, "rb") as file:
        while data := file.read(1 << 20):
            os.lseek(fd, len(data), os.SEEK_CUR) if data.count(0) == len(data) else os.write(fd, data)
        os.ftruncate(fd, file.tell())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _opened_to_all(template: Template, tmp_path: Path) -> Template:
    """The template as wnodesd would keep it: root's, for everybody to read."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o755)
    for name in (*template.files.values(), "overlay.qcow2"):
        shutil.copy(Path(template.folder, name), folder)
        (folder / name).chmod(0o444)
    disk = replace(template.disks[0], path=f"{folder}/overlay.qcow2")
    return replace(template, folder=str(folder), disks=(disk,))


def _as_user(user: pwd.struct_passwd, work: Callable[[], None]) -> None:
    """Run ``work`` in a child that is this user for good."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - a child of the test has to tell and to end
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _clone_and_attack(vm: Vm, template: Template, fd: int) -> None:
    async def wake() -> None:
        asked = identity.ask("clone")
        waiting = asyncio.ensure_future(GuestChannel.resume(vm.channels[0].path, timeout_s=15, wake=asked))
        await asyncio.sleep(0)
        process = await asyncio.to_thread(clone.start, vm, template)
        channel, told = await waiting
        identity.check(template.identity, asked, told)
        done = await channel.run(["sh", "-c", "head -c 50000000 /dev/zero >/dev/shm/x; echo done"])
        assert done.stdout == b"done\n", done
        channel.close()
        assert os.stat(f"/proc/{process.pid}").st_uid == os.getuid()
        _attack(fd, process.pid)

    asyncio.run(wake())


def _attack(fd: int, qemu: int) -> None:
    """All that a user can do to memory that is open in his own processes."""
    paths = [f"/proc/self/fd/{fd}", *(f"/proc/{qemu}/fd/{n}" for n in os.listdir(f"/proc/{qemu}/fd"))]
    ours = [path for path in paths if "memfd:template" in os.readlink(path)]
    assert len(ours) >= 2, "QEMU holds it too"
    for path in ours:
        opened = os.open(path, os.O_RDWR)
        _refused(lambda opened=opened: os.pwrite(opened, b"x", 0))
        _refused(lambda opened=opened: os.ftruncate(opened, 0))
        _refused(lambda opened=opened: os.ftruncate(opened, 1 << 40))
        _refused(lambda opened=opened: os.posix_fallocate(opened, 0, 1 << 31))
        _refused(lambda opened=opened: fcntl.fcntl(opened, fcntl.F_ADD_SEALS, 0x10))
        _refused(lambda opened=opened: os.fchmod(opened, 0o777))
        _refused(lambda opened=opened: _punch(opened))
        _refused(lambda opened=opened: _map_shared(opened))
        os.close(opened)
        _refused(lambda path=path: os.truncate(path, 0))


def _refused(attack: Callable[[], Any]) -> None:
    with pytest.raises(OSError):
        attack()


def _punch(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if libc.fallocate(fd, 3, 0, 4096):  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        raise OSError(ctypes.get_errno(), "fallocate")


def _map_shared(fd: int) -> None:
    mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
