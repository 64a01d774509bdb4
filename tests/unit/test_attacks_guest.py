"""A hostile root in the guest: what it says may end its own job, and reach nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import tracemalloc

import pytest

from wnodes_core.errors import ChannelLost
from wnodes_core.guest import client, frames, hostcmd, pump
from wnodes_core.guest.channel import GuestChannel


def test_a_guest_that_asks_for_the_agent_for_ever_and_reads_none_fills_no_memory(tmp_path):
    async def attack() -> str:
        loop = asyncio.get_running_loop()
        greetings = b"".join(b"WNODES-BOOT 1 %d\n" % (number % 2) for number in range(4000))
        with socket.socket(socket.AF_UNIX) as qemu:
            qemu.bind(str(tmp_path / "agent.sock"))
            qemu.listen()
            qemu.setblocking(False)
            connecting = asyncio.ensure_future(GuestChannel.connect(tmp_path / "agent.sock", timeout_s=20))
            guest, _ = await loop.sock_accept(qemu)
            with guest, contextlib.suppress(OSError):  # it hangs up while we speak
                await loop.sock_sendall(guest, greetings)
                await asyncio.wait({connecting})
            return str(connecting.exception())

    tracemalloc.start()
    message = asyncio.run(attack())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "asks for the agent again and again" in message
    assert peak < 32 << 20  # 4000 agents would be 300 MiB


@pytest.mark.parametrize("ending", ['{"code":1e999}', '{"signal":-1e999}', '{"code":[]}', '{"code":-1}'])
def test_an_ending_that_no_process_has_is_a_verdict(ending):
    told = client._Client.__new__(client._Client)
    told._ending = json.loads(ending)
    with pytest.raises(ChannelLost, match="want"):
        told._result()


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "SLURM_CONF", "GCONV_PATH", "BASH_ENV", "WNODES_TRACE"])
def test_no_variable_of_the_guest_loads_code_into_a_command_of_the_host(name, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    found = said_by_host({name: "/scratch/evil", "MINE": "1"})
    assert found["MINE"] == "1"
    assert found["SLURM_CONF"] == "/etc/slurm/slurm.conf"
    assert name == "SLURM_CONF" or name not in found


def said_by_host(environ: dict[str, str]) -> dict[str, str]:
    """The environment that a host command which the guest asked for finds itself in."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        code = "import os, json; print(json.dumps(dict(os.environ)))"
        wish = {"argv": ["srun", "-Ic", code], "cwd": "/", "environ": environ}
        link = pump.Link(ours.fileno(), frames.MAX_TO_HOST)
        host = hostcmd.start_host_command(link, 1, json.dumps(wish).encode(), {"srun": sys.executable})
        os.set_blocking(host.flow.sources[1].fd, True)
        text = b""
        while data := os.read(host.flow.sources[1].fd, 65536):
            text += data
        host._process.wait()
        host.close()
        link.close()
    return dict(json.loads(text))


@pytest.mark.parametrize("argv", [["/scratch/srun2"], ["../bash"], ["bash", "srun"], [], "srun", [["srun"]]])
def test_only_listed_names_run_on_the_host(argv):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = pump.Link(ours.fileno(), frames.MAX_TO_HOST)
        wish = json.dumps({"argv": argv, "cwd": "/", "environ": {}}).encode()
        host = hostcmd.start_host_command(link, 1, wish, {"srun": "/bin/false"})
        assert host._process is None and host.step(set())
        link.close()
