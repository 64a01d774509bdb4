"""The NFS provider without guest or server: which mounts get exports, what is told to ganesha, exportfs and mount."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core.agent import ports
from wnodes_core.agent.exports import Exports
from wnodes_core.api import Export, Mount, Port
from wnodes_core.errors import HostError, NoProvider, WnodesError
from wnodes_core.journal import Journal
from wnodes_core.model import Job
from wnodes_core.network import filters, flows
from wnodes_core.settings.network import port_span
from wnodes_core.storage import nfs, nfs_ganesha, nfs_kernel, nfs_source

NODE, LOCAL = "169.254.77.1", "169.254.80.5"
EXPORT = Export("l-1", 0, "nfs", "/data/a", False, 1001, 1002, (1002, 5), NODE, LOCAL, 256, "/run/wnodes/exports/l-1/0")
NASTY = 'x"; }\nEXPORT { Path = "/"; } #\' $(id)'


class Hook:
    """A provider that exports what is not called ``bad``; ``calls`` is what it was asked."""

    def __init__(self, *usable: dict[str, str]) -> None:
        self.usable = usable
        self.calls: list[tuple[str, str]] = []
        self.stuck = False

    def wnodes_mount_usable(self) -> list[dict[str, str]]:
        return list(self.usable)

    def wnodes_mount_export(self, export: Export) -> dict[str, Any] | None:
        self.calls.append(("make", export.name))
        if export.source == "/bad":
            raise NoProvider("not this one")
        if export.source == "/sick":
            raise HostError("no server")
        return {"port": export.port} if export.source != "/whose" else None

    def wnodes_mount_unexport(self, export: Export) -> bool:
        self.calls.append(("undo", export.name))
        if self.stuck:
            raise HostError("it stays")
        return True


SSHFS = {"provider": "sshfs", "problem": "", "needs": ""}
TCP = {"provider": "sshfs-tcp", "problem": "", "needs": "network"}
NFS = {"provider": "nfs", "problem": "", "needs": "export"}
KERNEL = {**NFS, "port": "2049"}


def plan_of(*sources: str, storage: tuple[str, ...] = ("nfs",), **more: Any) -> dict[str, Any]:
    return {
        "mounts": [{"source": each, "target": "/t", "read_only": False} for each in sources],
        "storage": storage,
        "nic": {"kind": "tap", "node": NODE},
        "port": {"node": NODE, "local": LOCAL, "own_ports": [256, 257, 258][: len(sources)]},
        "user": {"groups": {"a": 5}},
        **more,
    }


@pytest.fixture
def lease(tmp_path: Path) -> Any:
    journal = Journal(str(tmp_path / "journal"))
    yield SimpleNamespace(id="l-1", job=Job("fake", "1", "n0", 1001, 1002, "u"), journal=journal)
    journal.close()


def open_exports(lease: Any) -> list[str]:
    return [each.name for each in lease.journal.open_resources]


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        (("nfs",), (0, 0)),
        (("sshfs-tcp", "nfs", "sshfs"), (0, 0)),
        (("sshfs", "nfs"), ()),
        (("sshfs-tcp",), ()),
        (("unknown", "nfs"), (0, 0)),
    ],
)
def test_exports_are_made_for_what_the_order_reaches(order: tuple[str, ...], wanted: tuple[int, ...]) -> None:
    exports = Exports(lambda: Hook(SSHFS, TCP, NFS), "/run/wnodes")
    assert exports.ports_for(plan_of("/a", "/b", storage=order)) == wanted
    assert exports.ports_for({}) == ()


def test_a_server_of_all_leases_has_its_own_port() -> None:
    assert Exports(lambda: Hook(KERNEL), "/run").ports_for(plan_of("/a", "/b")) == (2049, 2049)


def test_what_cannot_be_exported_is_told_and_left_to_the_next(lease: Any) -> None:
    hook = Hook(NFS)
    made = Exports(lambda: hook, "/run").attach(lease, plan_of("/bad", "/sick", "/whose"))["exports"]
    assert made == {
        "0": {"problem": "not this one"},
        "1": {"problem": "no server"},
        "2": {"problem": "no plug-in makes exports for 'nfs'"},
    }
    assert open_exports(lease) == [] and [what for what, _ in hook.calls] == ["make", "undo"] * 3


def test_no_nic_too_few_ports_and_root_get_none(lease: Any) -> None:
    hook = Hook(NFS)
    exports = Exports(lambda: hook, "/run")
    assert exports.attach(lease, plan_of("/a", nic={"kind": "pci", "node": ""})) == {"exports": {}}
    few = plan_of("/a", "/b", port={"node": NODE, "local": LOCAL, "own_ports": [256]})
    assert exports.attach(lease, few) == {"exports": {"0": {"port": 256}}}
    lease.job = Job("fake", "1", "n0", 0, 0, "root")
    assert exports.attach(lease, plan_of("/a"))["exports"]["0"] == {"problem": "root's files are not exported"}
    assert hook.calls == [("make", "l-1-0")]


def test_the_journal_knows_an_export_before_it_is_made_and_until_it_is_gone(lease: Any) -> None:
    hook = Hook(NFS)
    exports = Exports(lambda: hook, "/run/wnodes")
    exports.attach(lease, plan_of("/a"))
    (resource,) = lease.journal.open_resources
    assert Export.from_dict(resource.data) == Export(
        "l-1", 0, "nfs", "/a", False, 1001, 1002, (5,), NODE, LOCAL, 256, "/run/wnodes/exports/l-1/0"
    )
    for _ in range(2):
        exports.detach(resource)
    hook.stuck = True
    with pytest.raises(WnodesError):
        exports.detach(resource)
    with pytest.raises(WnodesError):  # one that cannot be taken back stays in the journal
        exports.attach(lease, plan_of("/bad"))
    assert open_exports(lease) == ["l-1-0"]


def test_ports_are_those_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_can_listen", lambda number: number != 257)
    taken = [Port("other", "lan", "bridge", own_ports=(256, 2049))]
    assert list(ports._free_ports((0, 2049, 0), "256-259", taken)) == [258, 2049, 259]
    assert list(ports._free_ports((0, 0, 0), "256-258", taken)) == [258]
    assert port_span("256-343") == "256-343"
    for wrong in ("343", "9-1", "0-5", "1000-1024"):
        with pytest.raises(ValueError, match="FIRST-LAST"):
            port_span(wrong)


def test_own_ports_are_open_to_the_guest_and_to_nobody_else() -> None:
    port = Port("l", "lan", "bridge", device="wnt1", mac="02:00:00:00:00:01", node=NODE, local=LOCAL, own_ports=(256,))
    bridge = filters.bridge(port)
    guard = f"""table inet wnodes-wnt1 {{
  chain own_ports {{
    type filter hook input priority -200; policy accept;
    tcp dport {{ 256 }} iifname "{bridge}" ip saddr {LOCAL} ip daddr {NODE} accept
    tcp dport {{ 256 }} drop
  }}
}}
"""
    text = filters.of_tap(port, ())
    assert text.endswith(guard)
    assert f"ip saddr {LOCAL} ip daddr {NODE} tcp dport {{ 256 }} accept" in text
    assert filters.of_tap(port, {"inet wnodes-wnt1"}).endswith("delete table inet wnodes-wnt1\n" + guard)
    assert any("tp_dst=256" in each for each in flows._to_node(port))
    shared = Port("l", "lan", "bridge", device="wnt1", node=NODE, local=LOCAL, own_ports=(2049,))
    assert "inet" not in filters.of_tap(shared, ()), "the kernel's server has other guests, too"
    assert filters.needed(shared, ["netdev"]) == ["netdev wnodes-wnt1"]


def test_nothing_of_a_user_s_is_in_the_server_s_configuration() -> None:
    from dataclasses import replace

    text = nfs_ganesha.config(EXPORT, "/p")
    assert text == nfs_ganesha.config(replace(EXPORT, source=NASTY), "/p")
    assert "Anonymous_Uid = 1001; Anonymous_Gid = 1002;" in text and f"Clients = {LOCAL}; Access_Type = RW" in text
    assert "Access_Type = RO" in nfs_ganesha.config(replace(EXPORT, read_only=True), "/p")
    assert text.count("All_Squash") == text.count("PrivilegedPort = true") == 2 and text.count("Access_Type = NONE") == 1


def test_the_guest_mounts_by_version_4_with_a_patience(tmp_path: Path) -> None:
    mount = Mount(str(tmp_path), "/data/x", True)
    export = {"port": 256, "path": "/share", "node": NODE, "local": LOCAL}
    told = {"port": "org.wnodes.mount.0", "export": export}
    made = nfs.wnodes_mount_attach(mount, "", told, "nfs")
    assert made is not None and made["process"] is None
    probe, mounting = made["guest"]
    assert probe["argv"] == ["modprobe", "nfsv4"]
    options = (
        f"vers=4.2,port=256,addr={NODE},clientaddr={LOCAL},proto=tcp,sec=sys,nosuid,nodev,acregmax=2,acdirmax=2,"
        "soft,timeo=100,retrans=2,ro"
    )
    stage = "/run/wnodes/mounts/org.wnodes.mount.0"
    assert mounting["argv"] == ["mount", "-i", "-t", "nfs4", "-o", options, f"{NODE}:/share", stage]
    assert nfs.wnodes_mount_attach(mount, "", told, "sshfs") is None
    assert nfs.wnodes_mount_detach({"provider": "nfs"}) and nfs.wnodes_mount_detach({"provider": "sshfs"}) is None


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, "wants a network of kind bridge or ovs"),
        ({"export": {"problem": "no ganesha.nfsd on this host"}}, "no ganesha.nfsd on this host"),
        ({"export": {"port": 256}, "nfs": False}, "the guest's kernel has no NFS"),
    ],
)
def test_why_a_mount_is_left_to_the_next(tmp_path: Path, told: dict[str, Any], words: str) -> None:
    with pytest.raises(NoProvider, match=words):
        nfs.wnodes_mount_attach(Mount(str(tmp_path), "/t"), "", {"port": "p", **told}, "nfs")


def test_what_a_host_lacks_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nfs_kernel, "_THREADS", str(tmp_path / "none"))
    monkeypatch.setattr(nfs_ganesha.nfs_serve, "SERVER", str(tmp_path / "none"))
    told = nfs.wnodes_mount_usable()
    assert told == {"provider": "nfs", "problem": "no ganesha.nfsd on this host; install nfs-ganesha", "needs": "export"}
    with pytest.raises(HostError, match="no ganesha"):
        nfs_ganesha.start(EXPORT)
    (tmp_path / "threads").write_text("8\n")
    monkeypatch.setattr(nfs_kernel, "_THREADS", str(tmp_path / "threads"))
    monkeypatch.setattr(nfs_kernel, "problem", lambda: "")
    assert nfs.wnodes_mount_usable() == {"provider": "nfs", "problem": "", "needs": "export", "port": "2049"}


def test_exportfs_is_told_numbers_and_a_folder_of_roots() -> None:
    options = nfs_kernel.options(EXPORT).split(",")
    assert options[:5] == ["rw", "all_squash", "anonuid=1001", "anongid=1002", "subtree_check"]
    assert "no_root_squash" not in options and "mp" in options
    other = nfs_kernel.options(Export(**{**EXPORT.to_dict(), "index": 1, "read_only": True}))
    assert other.startswith("ro,") and other.split("fsid=")[1] != options[-1].removeprefix("fsid=")


def test_a_source_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfs_source, "_OPEN_S", 0.2)
    monkeypatch.setattr(nfs_source, "_open_as_user", lambda answer, told: time.sleep(30))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="did not answer"):
        nfs_source._opened_as_user({"source": "/hangs"})
    assert time.monotonic() - began < 10


def test_the_source_is_opened_by_the_user_alone(ordinary_user: Any) -> None:
    top = Path("/var/tmp") / f"wnodes-nfs-{os.getpid()}"
    (top / "own").mkdir(parents=True)
    (top / "closed").mkdir(mode=0o700)
    try:
        told = {"uid": ordinary_user.pw_uid, "gid": ordinary_user.pw_gid, "groups": [ordinary_user.pw_gid]}
        fd = nfs_source._opened_as_user({**told, "source": str(top / "own")})
        assert os.path.sameopenfile(fd, fd) and os.fstat(fd).st_ino == (top / "own").stat().st_ino
        os.close(fd)
        (top / "door").symlink_to(top / "closed")
        for wrong in ("closed", "door", "own/../closed", "none", NASTY):
            with pytest.raises(OSError, match="want a folder you can read"):
                nfs_source._opened_as_user({**told, "source": f"{top}/{wrong}"})
    finally:
        for name in ("own", "closed"):
            (top / name).rmdir()
        (top / "door").unlink()
        top.rmdir()
