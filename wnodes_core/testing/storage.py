"""What every storage provider must do on the host, as tests that its author inherits.

::

    class TestMine(StorageContract):
        provider, name = "my_package.storage", "mine"

What a job does with its files in a real guest is ``storage_guest``'s half. Override ``guest`` for
the facts of a guest that the provider can serve.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Mount, Process, errors
from wnodes_core.tools import alive, run

_SOON_S = 5.0
_NOBODY = 65534

Attach = Callable[..., dict[str, Any]]


class SourceContract:
    """Attach, detach, and all that may be wrong with a source, whoever serves it."""

    provider = ""
    name = ""
    needs = ""

    @pytest.fixture
    def hooks(self) -> Any:
        """The module under test."""
        return importlib.import_module(self.provider)

    @pytest.fixture
    def guest(self) -> dict[str, Any]:
        """Facts of a guest that can be served."""
        return {"port": "org.wnodes.mount.0", "sshfs": True, "fuse": True, "machine": os.uname().machine}

    @pytest.fixture
    def gone_guest(self, guest: dict[str, Any]) -> dict[str, Any]:
        """Facts of a guest that cannot be served, for its end of the way is not there."""
        return {**guest, "nic": None}

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        """A folder to serve."""
        folder = tmp_path / "source with a blank"
        folder.mkdir()
        (folder / "file").write_text("content")
        return folder

    @pytest.fixture
    def attach(self, hooks: Any, guest: dict[str, Any], tmp_path: Path) -> Iterator[Attach]:
        """Attach a folder to a port whose other end says nothing, as a guest that hangs; all ended afterwards."""
        made: list[dict[str, Any]] = []
        ends: list[socket.socket] = []

        def start(source: Path, *, read_only: bool = False) -> dict[str, Any]:
            path = str(tmp_path / f"port{len(ends)}")
            ends.append(socket.socket(socket.AF_UNIX))
            ends[-1].bind(path)
            ends[-1].listen(1)
            mount = Mount(str(source), "/t", read_only)
            if self.needs in ("device", "plug"):
                made.append(_equipped(hooks, mount, tmp_path, len(made), guest, self.name))
                return made[-1]
            attachment = hooks.wnodes_mount_attach(mount=mount, socket_path=path, guest=guest, provider=self.name)
            made.append(attachment)
            if not self.needs:  # it speaks through the port; others leave that alone
                ends.append(ends[-1].accept()[0])
            assert isinstance(attachment, dict)
            return attachment

        yield start
        for attachment in made:
            assert hooks.wnodes_mount_detach(attachment=attachment)
        for end in ends:
            end.close()

    def test_it_says_that_it_is_usable_here(self, hooks: Any) -> None:
        told = {"needs": "", **hooks.wnodes_mount_usable()}
        assert told == {"provider": self.name, "problem": "", "needs": self.needs}

    def test_attach_tells_all_that_is_needed(self, attach: Attach, source: Path) -> None:
        made = attach(source)
        assert made["provider"] == self.name
        assert isinstance(made["notice"], str)
        for step in made["guest"]:
            assert all(isinstance(word, str) for word in step["argv"]), "an argv list, never a shell's text"
        assert json.loads(json.dumps(made)) == made, "it goes into the journal"

    def test_detach_may_be_repeated(self, hooks: Any, attach: Attach, source: Path) -> None:
        made = attach(source)
        for _ in range(2):
            assert hooks.wnodes_mount_detach(attachment=made) is True

    def test_what_is_anothers_is_left_alone(self, hooks: Any, guest: dict[str, Any], source: Path) -> None:
        mount = Mount(str(source), "/t")
        asked = {"mount": mount, "socket_path": "/nowhere", "guest": guest}
        assert hooks.wnodes_mount_attach(**asked, provider=f"not-{self.name}") is None
        assert hooks.wnodes_mount_detach(attachment={"provider": f"not-{self.name}"}) is None

    @pytest.mark.parametrize("kind", ["absent", "file", "dangling link", "device"])
    def test_a_source_that_is_no_folder_is_denied(self, hooks: Any, guest: Any, tmp_path: Path, kind: str) -> None:
        path = tmp_path / kind
        if kind == "file":
            path.write_text("")
        elif kind == "dangling link":
            path.symlink_to("nowhere")
        elif kind == "device":
            path = Path("/dev/null")
        with pytest.raises(errors.MountDenied, match="want a folder you can read") as caught:
            hooks.wnodes_mount_attach(
                mount=Mount(str(path), "/t"), socket_path="/nowhere", guest=guest, provider=self.name
            )
        assert str(path) in caught.value.message

    @pytest.mark.skipif(os.getuid() != 0, reason="takes on another user's rights")
    def test_a_source_that_the_user_may_not_read_is_denied(self, hooks: Any, guest: Any, source: Path) -> None:
        source.chmod(0o700)

        def try_it() -> str:
            try:
                hooks.wnodes_mount_attach(
                    mount=Mount(str(source), "/t"), socket_path="/nowhere", guest=guest, provider=self.name
                )
            except errors.MountDenied as error:
                return error.message
            return "served"

        assert "Permission denied" in _as_nobody(try_it)

    def test_a_guest_that_is_gone_leaves_no_gateway(
        self, hooks: Any, gone_guest: Any, source: Path, tmp_path: Path
    ) -> None:
        before = _children()
        asked = {"mount": Mount(str(source), "/t"), "guest": gone_guest, "provider": self.name}
        with pytest.raises((OSError, errors.WnodesError)):
            hooks.wnodes_mount_attach(socket_path=str(tmp_path / "no.sock"), **asked)
        assert _children() == before


class StorageContract(SourceContract):
    """All of ``SourceContract``, then the life of the process that each mount has: its gateway."""

    def test_attach_names_a_process_of_the_users(self, attach: Attach, source: Path) -> None:
        made = attach(source)
        assert alive(_process(made))
        assert os.stat(f"/proc/{made['process']['pid']}").st_uid == os.getuid()

    def test_detach_ends_it(self, hooks: Any, attach: Attach, source: Path) -> None:
        made = attach(source)
        for _ in range(2):
            assert hooks.wnodes_mount_detach(attachment=made) is True
            assert not alive(_process(made))

    def test_another_process_detaches_it(self, attach: Attach, source: Path) -> None:
        made = attach(source)
        argv = [sys.executable, "-m", "wnodes_core.testing.storage", self.provider, json.dumps(made)]
        assert run(argv).text == "True\n"
        assert not alive(_process(made))

    def test_a_stopped_gateway_does_not_hold_up_teardown(self, hooks: Any, attach: Attach, source: Path) -> None:
        made = attach(source)
        os.kill(made["process"]["pid"], signal.SIGSTOP)
        began = time.monotonic()
        assert hooks.wnodes_mount_detach(attachment=made) is True
        assert time.monotonic() - began < _SOON_S
        assert not alive(_process(made))

    def test_one_that_died_is_detached_all_the_same(self, hooks: Any, attach: Attach, source: Path) -> None:
        made = attach(source)
        os.kill(made["process"]["pid"], signal.SIGKILL)
        assert hooks.wnodes_mount_detach(attachment=made) is True

    def test_ending_one_spares_the_other(self, hooks: Any, attach: Attach, source: Path) -> None:
        one, other = attach(source), attach(source, read_only=True)
        hooks.wnodes_mount_detach(attachment=one)
        assert alive(_process(other)) and not alive(_process(one))

    def test_a_reused_pid_is_left_alone(self, hooks: Any, attach: Attach, source: Path) -> None:
        made = attach(source)
        stranger = {**made, "process": {"pid": os.getpid(), "started": 1}}
        assert hooks.wnodes_mount_detach(attachment=stranger) is True, "it would have ended this very process"


def _equipped(
    hooks: Any, mount: Mount, folder: Path, index: int, guest: dict[str, Any], name: str
) -> dict[str, Any]:
    """A device's two halves, before the VM and in its guest, as one attachment."""
    asked = {"mount": mount, "provider": name}
    device = hooks.wnodes_mount_equip(index=index, folder=str(folder), guest={}, memory=None, **asked)
    assert device["filesystem"].keys() == {"kind", "source", "tag", "read_only"}
    shown = hooks.wnodes_mount_attach(socket_path="/nowhere", guest={**guest, "equipped": device}, **asked)
    assert hooks.wnodes_mount_detach(attachment=shown) is True, "it is no more than what the guest was told"
    return {**shown, **device}


def _process(made: dict[str, Any]) -> Process:
    return Process(made["process"]["pid"], 0, 0, made["process"]["started"], "", ())


def _children() -> set[str]:
    return {
        pid
        for task in os.listdir("/proc/self/task")
        for pid in Path(f"/proc/self/task/{task}/children").read_text().split()
    }


def _as_nobody(ask: Callable[[], str]) -> str:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
            os.write(writer, ask().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


if __name__ == "__main__":
    print(importlib.import_module(sys.argv[1]).wnodes_mount_detach(attachment=json.loads(sys.argv[2])))
