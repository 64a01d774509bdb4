"""Guests that know nothing of us: how cloud-init and qemu-ga are made to start the bootstrap."""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from wnodes_core import command
from wnodes_core.backends.libvirt import plugin
from wnodes_core.errors import HostError, ImageError
from wnodes_core.guest import start, strangers
from wnodes_core.model import Vm


def test_the_way_in_is_a_fact_of_the_image():
    assert strangers.kind_of({}) == "builtin"
    assert strangers.kind_of({"agent": "qemu-ga"}) == "qemu-ga"
    with pytest.raises(ImageError, match="agent='telepathy': want one of builtin"):
        strangers.kind_of({"agent": "telepathy"})


def test_the_seed_disk_carries_label_and_bootstrap(tmp_path):
    strangers.make_seed(str(tmp_path), str(tmp_path / "seed.iso"), "wn-1")
    image = (tmp_path / "seed.iso").read_bytes()
    assert image[0x8001:0x8006] == b"CD001" and b"cidata" in image[0x8000:0x8100]
    user_data = (tmp_path / "seed" / "user-data").read_text()
    assert user_data.startswith("#cloud-config\n")
    assert json.loads(user_data.partition("\n")[2])["bootcmd"][0][0] == "/usr/bin/python3"


def test_a_host_that_makes_no_iso_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(strangers, "ISO_MAKERS", ("no-such-program",))
    with pytest.raises(HostError, match="no program here makes an ISO"):
        strangers.make_seed(str(tmp_path), str(tmp_path / "seed.iso"), "wn-1")


def test_the_guest_agent_is_asked_until_it_answers_and_then_given_the_bootstrap(monkeypatch):
    monkeypatch.setattr(strangers, "_ASK_EVERY_S", 0)
    asked = []

    def ask(text, timeout_s):
        asked.append(json.loads(text)["execute"])
        return '{"return": {}}' if len(asked) > 2 else None

    asyncio.run(strangers.ask_guest_agent(ask))
    assert asked == ["guest-ping"] * 3 + ["guest-exec"]


def test_what_the_guest_agent_starts_runs_detached_from_it(tmp_path):
    """The words of guest-exec with a text of the test's in the bootstrap's place, as any user."""
    (command,) = start.guest_agent_commands()
    path, argv = command["arguments"]["path"], command["arguments"]["arg"]
    assert [path, *argv[:3]] == ["/usr/bin/nice", "-n", "-15", "/usr/bin/python3"]
    told = tmp_path / "told"
    os.mkfifo(told)
    text = f"""
import os
with open({str(told)!r}, "w") as file:
    print(__name__, os.getsid(0) == os.getpid(), *(os.readlink(f"/proc/self/fd/{{n}}") for n in range(3)), file=file)
"""
    done = subprocess.run(argv[2:], input=text.encode(), check=True, capture_output=True, timeout=20)
    assert (done.stdout, done.stderr) == (b"", b"")  # and both were closed, or this would not have returned
    assert told.read_text() == "__main__ True /dev/null /dev/null /dev/null\n"


def test_an_agent_that_forbids_exec_is_the_image_s_fault_with_a_way_out():
    def ask(text, timeout_s):
        if "guest-exec" in text:
            raise ImageError("refused")
        return "{}"

    with pytest.raises(ImageError) as caught:
        asyncio.run(strangers.ask_guest_agent(ask))
    assert "docs/images.md" in caught.value.hint


def test_no_vm_of_this_process_no_answer():
    """wnodes_vm_ask_agent in a process that started nothing."""
    vm = Vm("n", "/f", 1, 128, "tcg", ())
    assert plugin.wnodes_vm_ask_agent(vm, "{}", 1) is None


def test_iso_makers_are_real_programs():
    assert any(Path(folder, name).exists() for name in strangers.ISO_MAKERS for folder in command.PATH.split(":"))
