"""A booted guest for tests that want one and do not test how VMs are started.

QEMU is started directly, so a fault of the backend shows in the backend's own tests only. A lock
lets one such guest run at a time: two emulated ones on two cores starve each other.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from wnodes_core.guest.channel import Done, GuestChannel
from wnodes_core.model import Image

LOCK = Path(tempfile.gettempdir()) / "wnodes-test-guest.lock"
AGENT, MOUNT = "org.wnodes.agent.0", "org.wnodes.mount.{}"


class Guest:
    """A guest under TCG with its channel, on an event loop of its own."""

    def __init__(self, image: Image, *, mounts: int = 12, memory_mib: int = 768, cpus: int = 2) -> None:
        self.lock = open(LOCK, "a")  # noqa: SIM115 - held until close
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.folder = Path(tempfile.mkdtemp(prefix="wnodes-guest-"))
        self.folder.chmod(0o755)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        overlay = str(self.folder / "overlay")
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", image.path, "-F", image.format, overlay], check=True
        )
        ports = [AGENT, *(MOUNT.format(i) for i in range(mounts))]
        self.process = subprocess.Popen(self._argv(image, overlay, ports, memory_mib, cpus), stdin=subprocess.DEVNULL)
        try:
            self._wait_for_sockets(len(ports))
            connect = GuestChannel.connect(self.socket(0), timeout_s=120)
            self.channel = self.wait(connect, 130)
            self.facts: dict[str, Any] = self.wait(self.channel.request("hello"), 30)
        except BaseException:
            self.close()
            raise

    def socket(self, index: int) -> str:
        """Host side of port number ``index``; 0 is the agent's."""
        return str(self.folder / f"port{index}")

    def _argv(self, image: Image, overlay: str, ports: Sequence[str], memory_mib: int, cpus: int) -> list[str]:
        boot = image.boot
        assert boot is not None
        argv = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "Nehalem"]
        argv += ["-smp", str(cpus), "-m", str(memory_mib), "-nodefaults", "-display", "none", "-vga", "none"]
        argv += ["-no-reboot", "-kernel", boot.kernel, "-initrd", boot.initrd]
        argv += ["-append", f"{boot.cmdline} mitigations=off"]  # as the backend has it of an emulated CPU
        argv += ["-drive", f"file={overlay},if=virtio,cache=unsafe", "-device", "virtio-rng-pci"]
        argv += ["-serial", f"file:{self.folder}/console.log", "-device", "virtio-serial"]
        for i, name in enumerate(ports):
            argv += ["-chardev", f"socket,id=c{i},path={self.socket(i)},server=on,wait=off"]
            argv += ["-device", f"virtserialport,chardev=c{i},name={name}"]
        return argv

    def _wait_for_sockets(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while not all(os.path.exists(self.socket(i)) for i in range(count)):
            assert self.process.poll() is None and time.monotonic() < deadline, "QEMU did not start"
            time.sleep(0.01)

    def wait(self, awaitable: Any, timeout_s: float) -> Any:
        """The result of something that runs on the guest's loop."""
        return asyncio.run_coroutine_threadsafe(awaitable, self.loop).result(timeout_s)

    def run(self, argv: Sequence[str] | str, *, timeout_s: float = 60.0, **more: Any) -> Done:
        """Run a command as guest root, or as ``uid``; text is a bash script."""
        words = ["bash", "-c", argv] if isinstance(argv, str) else list(argv)
        done: Done = self.wait(self.channel.run(words, timeout_s=timeout_s, **more), timeout_s + 5)
        return done

    def console(self) -> str:
        """What the guest printed on its serial console."""
        return (self.folder / "console.log").read_text(errors="replace")

    def close(self) -> None:
        """End it and leave nothing."""
        self.process.kill()
        self.process.wait()
        with suppress(AttributeError):
            self.loop.call_soon_threadsafe(self.channel.close)
        self.wait(_settle(), 5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.close()


async def _settle() -> None:
    """Let closed transports finish, so that nothing warns of them later."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)
