"""Exports through the kernel's server: real mounts, and an exportfs that does as exportfs(8) says and notes it.

This kernel may have no NFS server: ``test_nfsd_guest`` has one.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import command
from wnodes_core.api import Export
from wnodes_core.errors import HostError, NoProvider
from wnodes_core.storage import nfs, nfs_kernel

FAKE = """#!/usr/bin/python3 -I
import os, sys
folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
table, words = os.path.join(folder, "etab"), sys.argv[1:]
found = open(table).read().splitlines() if os.path.exists(table) else []
with open(os.path.join(folder, "said"), "a") as said:
    said.write(" ".join(words) + "\\n")
if words[:1] == ["-o"]:
    host, _, path = words[2].partition(":")
    if os.path.exists(os.path.join(folder, "broken")):
        sys.exit("exportfs: " + path + " does not support NFS export")
    found = [each for each in found if each.split()[0] != path] + [f"{path}  {host}({words[1]})"]
elif words[:1] == ["-u"]:
    host, _, path = words[1].partition(":")
    left = [each for each in found if not each.startswith(f"{path}  {host}(")]
    if left == found:
        sys.exit(f"exportfs: Could not find '{words[1]}' to unexport.")
    found = found if os.path.exists(os.path.join(folder, "deaf")) else left
elif words == ["-s"]:
    print("\\n".join(found))
open(table, "w").write("".join(each + "\\n" for each in found))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/exportfs").write_text(FAKE)
    (tmp_path / "bin/exportfs").chmod(0o755)
    monkeypatch.setattr(command, "PATH", f"{tmp_path}/bin:{command.PATH}")
    yield tmp_path
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def export(place: Path, ordinary_user: Any) -> Iterator[Export]:
    source = Path(subprocess.run(["mktemp", "-d", "-p", "/var/tmp"], capture_output=True, text=True).stdout.strip())
    (source / "file").write_text("of the host")
    os.chown(source, ordinary_user.pw_uid, -1)
    uid, gid = ordinary_user.pw_uid, ordinary_user.pw_gid
    folder = f"{place}/exports/l-1/0"
    yield Export("l-1", 0, "nfs", str(source), True, uid, gid, (gid,), "169.254.77.1", "169.254.80.5", 2049, folder)
    (source / "file").unlink()
    source.rmdir()


def test_an_export_is_a_mount_of_root_s_and_goes_again(place: Path, export: Export) -> None:
    for _ in range(2):  # once more in place of what an earlier attempt left
        made = nfs.wnodes_mount_export(export=export)
        assert made == {"port": 2049, "path": export.folder, "node": "169.254.77.1", "local": "169.254.80.5"}
        assert Path(export.folder, "file").read_text() == "of the host"
        (line,) = [each for each in Path("/proc/self/mountinfo").read_text().splitlines() if export.folder in each]
        assert {"ro", "nosuid", "nodev"} <= set(line.split()[5].split(","))
    assert os.stat(f"{place}/exports").st_mode & 0o777 == 0o700
    for _ in range(2):
        assert nfs.wnodes_mount_unexport(export=export)
    assert not os.path.exists(f"{place}/exports/l-1") and (place / "etab").read_text() == ""
    name = f"169.254.80.5:{export.folder}"
    exported = f"-o {nfs_kernel.options(export)} {name}"
    back = [f"-u {name}", "-s"]
    assert (place / "said").read_text().splitlines() == [exported, *back, exported, *back]


def test_what_cannot_be_exported_leaves_nothing(place: Path, export: Export) -> None:
    (place / "broken").touch()
    with pytest.raises(HostError, match="does not support NFS export"):
        nfs.wnodes_mount_export(export=export)
    assert nfs.wnodes_mount_unexport(export=export)
    for source in ("/root", "/nowhere", f"{export.source}/file"):
        with pytest.raises(NoProvider, match="want a folder you can read"):
            nfs.wnodes_mount_export(export=replace(export, source=source))
        assert nfs.wnodes_mount_unexport(export=export)


def test_a_source_that_is_in_use_or_a_server_that_keeps_it(place: Path, export: Export) -> None:
    nfs.wnodes_mount_export(export=export)
    with open(f"{export.folder}/file"):
        (place / "deaf").touch()
        with pytest.raises(HostError, match="is still exported"):
            nfs.wnodes_mount_unexport(export=export)
        (place / "deaf").unlink()
        assert nfs.wnodes_mount_unexport(export=export), "an open file holds up nothing"
