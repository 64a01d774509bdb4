"""doctor: every check, on faked hosts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from wnodes_core import doctor, settings
from wnodes_core.doctor import CHECKS
from wnodes_core.doctor_finding import Finding, State
from wnodes_core.doctor_host import Host, Space, existing, mount_of
from wnodes_core.errors import HostError, NoKvm, SettingsError, TransientError
from wnodes_core.settings import Settings
from wnodes_core.settings.network import NetworkRule, NetworkSettings
from wnodes_core.settings.scratch import ScratchSettings

GIB = 1 << 30


def device(mode: int, gid: int = 0) -> os.stat_result:
    return os.stat_result([0o020000 | mode, 1, 1, 1, 0, gid, 0, 0, 0, 0])


class FakeHost(Host):
    """A healthy production node; keyword arguments change single facts."""

    def __init__(self, **changes: Any) -> None:
        self.facts: dict[str, Any] = {
            "stats": {"/dev/kvm": device(0o666), "/dev/vhost-vsock": device(0o666)},
            "texts": {
                "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
                "/proc/sys/user/max_user_namespaces": "9999\n",
                "/sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
            },
            "programs": ["qemu-img", "sshfs", "mke2fs"],
            "storage": {"sshfs": ""},
            "globs": ["/usr/lib/x/libvirt_driver_qemu.so"],
            "modules": ["libvirt"],
            "spaces": {
                "/var/lib/wnodes": Space("ext4", "/", 50 * GIB, 99 * GIB),
                "/run/wnodes": Space("tmpfs", "/run", 1, 1),
            },
            "direct": True,
            "abi": 7,
            "clock": True,
            "daemon": {"version": "1", "pid": 7, "leases": 2},
            "probe": {"accel": "kvm", "notice": "", "qemu": "8.2", "libvirt": "10.0"},
            "adapters": {"slurm": ""},
            "volumes": [],
        }
        for key, value in changes.items():
            old = self.facts[key]
            self.facts[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) and value else value

    def _answer(self, key: str) -> Any:
        if isinstance(self.facts[key], Exception):
            raise self.facts[key]
        return self.facts[key]

    def text(self, path: str) -> str:
        return self.facts["texts"].get(path, "")

    def stat(self, path: str) -> os.stat_result | None:
        return self.facts["stats"].get(path)

    def node_name(self) -> str:
        return "wn17"

    def program(self, *names: str) -> str:
        return next((f"/usr/bin/{name}" for name in names if name in self.facts["programs"]), "")

    def storage(self, settings: Settings) -> dict[str, str]:
        return self.facts["storage"]

    def glob(self, pattern: str) -> list[str]:
        return self.facts["globs"]

    def module(self, name: str) -> bool:
        return name in self.facts["modules"]

    def space(self, path: str) -> Space:
        return self.facts["spaces"][path]

    def direct_io(self, path: str) -> bool | None:
        return self.facts["direct"]

    def landlock(self) -> int:
        return self.facts["abi"]

    def clock_synchronised(self) -> bool | None:
        return self.facts["clock"]

    def daemon(self, path: str) -> dict[str, Any] | None:
        return self._answer("daemon")

    def probe(self, settings: Settings) -> dict[str, Any]:
        return self._answer("probe")

    def adapters(self) -> dict[str, str]:
        return self._answer("adapters")

    def volumes(self, scratch: ScratchSettings) -> list[tuple[str, str]]:
        return self._answer("volumes")


def examine(host: Host, load: Callable[[], Settings] = Settings) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(host, load=load)}


def test_a_healthy_node() -> None:
    found = examine(FakeHost())
    assert {one.state for one in found.values()} == {State.OK}
    assert len(found) == len(CHECKS) + 1
    assert all(one.seen and not one.advice for one in found.values())


def texts(**changes: str) -> dict[str, Any]:
    return {"texts": changes}


SICK: list[tuple[dict[str, Any], str, State, str, str]] = [
    ({"stats": {"/dev/kvm": None}}, "kvm device", State.NOTICE, "no /dev/kvm", "firmware"),
    ({"stats": {"/dev/kvm": device(0o600)}}, "kvm device", State.NOTICE, "crw-------, uid 0, gid 0", "chmod 666"),
    ({"stats": {"/dev/kvm": device(0o600)}}, "kvm device", State.NOTICE, "probe QEMU anew at every start", "udev"),
    ({"stats": {"/dev/kvm": device(0o660, 104)}}, "kvm device", State.NOTICE, "gid 104", "into its group"),
    ({"probe": {"notice": "a probe guest hung"}}, "hypervisor", State.NOTICE, "a probe guest hung", "KVM works"),
    ({"probe": NoKvm("KVM is demanded", hint="auto")}, "hypervisor", State.PROBLEM, "KVM is demanded", "auto"),
    ({"modules": []}, "libvirt", State.PROBLEM, "no Python module", "libvirt-dev"),
    ({"globs": []}, "libvirt", State.PROBLEM, "no QEMU driver", "install"),
    ({"programs": ["sshfs", "mke2fs"]}, "qemu-img", State.PROBLEM, "not found", "qemu-utils"),
    ({"programs": ["qemu-img", "mke2fs"]}, "sshfs", State.NOTICE, "not found", "install sshfs"),
    ({"programs": ["qemu-img", "sshfs"]}, "scratch", State.NOTICE, "no mke2fs", "e2fsprogs"),
    ({"storage": {"sshfs": "no server"}}, "storage", State.PROBLEM, "sshfs: no server", "change storage.order"),
    ({"storage": {"sshfs": "no server", "b": ""}}, "storage", State.PROBLEM, "not in the site's order: b (usable)", "order"),
    ({"abi": 0}, "landlock", State.NOTICE, "ABI 0", "kernel"),
    (
        {"spaces": {"/var/lib/wnodes": Space("ext4", "/", GIB, GIB)}},
        "state folder",
        State.PROBLEM,
        "1 of 1 GiB",
        "purge",
    ),
    (
        {"spaces": {"/var/lib/wnodes": Space("nfs4", "/", 9 * GIB, 9 * GIB)}},
        "state folder",
        State.PROBLEM,
        "shared",
        "local",
    ),
    (
        {"spaces": {"/var/lib/wnodes": Space("tmpfs", "/", 9 * GIB, 9 * GIB)}},
        "state folder",
        State.NOTICE,
        "memory",
        "local",
    ),
    ({"direct": False}, "state folder", State.NOTICE, "no O_DIRECT", "xfs"),
    ({"spaces": {"/run/wnodes": Space("ext4", "/", 1, 1)}}, "run folder", State.NOTICE, "outlives", "/run"),
    (texts(**{"/sys/fs/cgroup/cgroup.controllers": "cpu pids"}), "cgroups", State.NOTICE, "v2: cpu pids", "memory"),
    (texts(**{"/sys/fs/cgroup/cgroup.controllers": ""}), "cgroups", State.NOTICE, "no controllers", "cpu and memory"),
    (texts(**{"/proc/sys/user/max_user_namespaces": "0"}), "user namespaces", State.NOTICE, "off", "build images"),
    (
        texts(**{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"}),
        "user namespaces",
        State.NOTICE,
        "off",
        "build images",
    ),
    ({"clock": False}, "clock", State.NOTICE, "not synchronised", "chrony"),
    (
        texts(**{"/sys/devices/system/clocksource/clocksource0/current_clocksource": "hpet"}),
        "clock",
        State.NOTICE,
        "hpet is slow",
        "dmesg",
    ),
    ({"daemon": None}, "wnodesd", State.NOTICE, "not running", "enable --now wnodesd"),
    ({"daemon": TransientError("no answer")}, "wnodesd", State.PROBLEM, "no answer", "restart"),
    ({"adapters": {}}, "adapters", State.NOTICE, "none installed", "pip install"),
    ({"adapters": {"slurm": "ImportError: x"}}, "adapters", State.PROBLEM, "slurm: ImportError: x", "reinstall"),
]


NETS = {
    "programs": ["qemu-img", "sshfs", "ip", "nft", "ovs-vsctl"],
    "stats": {"/dev/net/tun": device(0o666), "/sys/class/net/eth1": device(0o755), "/proc/net/vlan": device(0o755)},
}


def carrying(*rules: NetworkRule) -> Callable[[], Settings]:
    return lambda: replace(Settings(), network=NetworkSettings(networks=rules))


LAN = NetworkRule(name="lan", uplink="eth1", vlan="42")
LACKS: list[tuple[dict[str, Any], NetworkRule, str, str]] = [
    ({"programs": ["qemu-img", "sshfs", "ip"]}, LAN, "lan: no nft", "install nftables"),
    ({"programs": ["qemu-img", "sshfs", "ip", "nft"]}, NetworkRule(name="sw", kind="ovs", bridge="b"), "sw: no ovs-vsctl", "install"),
    ({"stats": {**NETS["stats"], "/proc/net/vlan": None}, "globs": []}, LAN, "lan: this kernel has no 8021q", "kind: ovs"),
    ({"stats": {**NETS["stats"], "/sys/class/net/eth1": None}}, LAN, "lan: no device eth1", "uplink"),
    ({"stats": {**NETS["stats"], "/dev/net/tun": None}}, LAN, "no /dev/net/tun", "modprobe tun"),
    ({"stats": {**NETS["stats"], "/dev/net/tun": device(0o600)}}, LAN, "QEMU runs as the job's user", "chmod 666 /dev/net/tun"),
    ({}, NetworkRule(name="vf", kind="pci", uplink="eth1"), "vf: no IOMMU", "iommu=on"),
]


@pytest.mark.parametrize(("changes", "rule", "seen", "advice"), LACKS, ids=[each[2] for each in LACKS])
def test_a_network_that_cannot_be_made_is_a_problem(changes: dict[str, Any], rule: NetworkRule, seen: str, advice: str) -> None:
    found = examine(FakeHost(**{**NETS, **changes}), carrying(rule))["networks"]
    assert (found.state, seen in found.seen, advice in found.advice) == (State.PROBLEM, True, True), found


def test_networks_that_can_be_made_are_named_with_what_is_possible() -> None:
    found = examine(FakeHost(**NETS), carrying(LAN, NetworkRule(name="far", nodes=("wn2*",), uplink="eth9")))["networks"]
    assert found == Finding("networks", State.OK, "possible here: user, bridge with VLANs, ovs; carried: lan")
    poor = examine(FakeHost(globs=["/usr/lib/x/libvirt_driver_qemu.so"]))["networks"]
    assert poor.seen == "possible here: user; carried: none"
    filtered = examine(FakeHost(**NETS, **texts(**{"/proc/sys/net/bridge/bridge-nf-call-iptables": "1\n"})), carrying(LAN))
    assert (filtered["networks"].state, "iptables" in filtered["networks"].seen) == (State.NOTICE, True)


def under(bounds: int, settings: Settings) -> Finding:
    host = FakeHost(**{**NETS, **texts(**{"/proc/7/status": f"Name:\twnodesd\nCapBnd:\t{bounds:016x}\nCapAmb:\t{1 << 12:016x}\n"})})
    return examine(host, lambda: settings)["wnodesd"]


def test_a_unit_without_the_rights_that_the_settings_ask_for_is_told_its_drop_in() -> None:
    admin, mknod, net = 1 << 21, 1 << 27, 1 << 12
    network = carrying(LAN)()
    volumes = replace(Settings(), scratch=ScratchSettings(volume_group="vg0"))
    found = under(admin | mknod, network)
    assert (found.state, "without CAP_NET_ADMIN" in found.seen) == (State.PROBLEM, True)
    assert "wnodesd --print-drop-in network > /etc/systemd/system/wnodesd.service.d/network.conf" in found.advice
    found = under(net | admin, volumes)
    assert (found.state, "without CAP_MKNOD (drop-in lvm)" in found.seen, "network" in found.advice) == (State.PROBLEM, True, False)
    assert [under(net, network).state, under(admin | mknod, volumes).state] == [State.OK, State.OK]
    exports = replace(Settings(), storage=replace(Settings().storage, order=("nfs", "sshfs")))
    assert "without CAP_NET_BIND_SERVICE (drop-in nfs)" in under(admin, exports).seen
    assert under(admin | 1 << 10, exports).state is State.OK
    assert under(0, Settings()).state is State.OK
    assert under(0, carrying(NetworkRule(name="far", nodes=("wn2*",), uplink="eth1"))()).state is State.OK


@pytest.mark.parametrize("changes, name, state, seen, advice", SICK)
def test_what_is_wrong_is_named_with_a_way_out(
    changes: dict[str, Any], name: str, state: State, seen: str, advice: str
) -> None:
    found = examine(FakeHost(**changes))
    assert (found[name].state, seen in found[name].seen, advice in found[name].advice) == (state, True, True), found[
        name
    ]
    assert {one.state for other, one in found.items() if other != name} == {State.OK}


def test_every_check_can_find_something() -> None:
    able = {name for _, name, *_ in SICK} | {"socket paths", "networks"}
    assert able | {"vsock", "settings"} == set(examine(FakeHost()))


def test_without_vsock_all_is_well() -> None:
    assert "virtio-serial" in examine(FakeHost(stats={"/dev/vhost-vsock": None}))["vsock"].seen


def test_cgroup_v1() -> None:
    old = FakeHost(
        texts={"/sys/fs/cgroup/cgroup.controllers": "", "/proc/self/cgroup": "4:memory:/x\n1:cpu,cpuacct:/\n0::/\n"}
    )
    assert examine(old)["cgroups"] == Finding("cgroups", State.OK, "v1: cpu cpuacct memory")


def test_a_site_that_wants_kvm_has_a_problem_without_it() -> None:
    found = examine(FakeHost(stats={"/dev/kvm": None}), load=lambda: Settings(accel="kvm"))
    assert found["kvm device"].state is State.PROBLEM


def test_long_paths_do_not_fit_a_socket() -> None:
    folder = "/srv/" + 52 * "x"
    host = FakeHost(spaces={folder: Space("ext4", "/", 50 * GIB, 50 * GIB)})
    found = examine(host, load=lambda: Settings(state_dir=folder))["socket paths"]
    assert (found.state, found.seen) == (State.PROBLEM, "110 bytes, 3 too many")
    assert found.advice == "make state_dir 3 bytes shorter"


def test_settings_of_an_adapter_that_is_not_there() -> None:
    found = examine(FakeHost(), load=lambda: replace(Settings(), lrms={"lsf": {}}))["adapters"]
    assert (found.state, "lsf" in found.seen) == (State.PROBLEM, True)


def test_invalid_settings_are_a_problem_and_the_rest_is_still_checked() -> None:
    def load() -> Settings:
        raise SettingsError("/etc/wnodes/wnodes.yaml:3:1: unknown key 'x'", hint="did you mean y?")

    found = examine(FakeHost(), load=load)
    assert found["settings"] == Finding(
        "settings", State.PROBLEM, "/etc/wnodes/wnodes.yaml:3:1: unknown key 'x'", "did you mean y?"
    )
    assert len(found) == len(CHECKS) + 1


def test_a_check_that_fails_hides_no_other() -> None:
    found = examine(FakeHost(adapters=RuntimeError("boom")))
    assert found["adapters"].state is State.PROBLEM and "RuntimeError: boom" in found["adapters"].seen
    assert found["wnodesd"].state is State.OK


def test_the_real_host_answers(tmp_path) -> None:
    host = Host()
    assert host.text("/proc/self/stat") and host.text("/no/such/file") == ""
    assert host.stat("/no/such/file") is None
    assert host.program("no-such-program", "sh").endswith("/sh")
    space = host.space(str(tmp_path / "not" / "yet"))
    assert space.total >= space.free > 0 and space.kind  # "?" in a chroot, whose root is no mount of its own
    assert host.direct_io(str(tmp_path)) in (True, False) and os.listdir(tmp_path) == []
    assert host.landlock() >= 0
    assert host.clock_synchronised() in (True, False, None)
    assert host.daemon(str(tmp_path / "none.sock")) is None
    assert host.module("wnodes_core") and not host.module("no_such_module")


def test_existing_folder_above(tmp_path) -> None:
    assert existing(str(tmp_path / "a" / "b")) == str(tmp_path)
    assert existing("/no/such") == "/"


def test_the_nearest_mount_counts() -> None:
    info = (
        "22 1 0:20 / / rw - ext4 /dev/a rw\n"
        "23 22 0:21 / /srv rw shared:1 - xfs /dev/b rw\n"
        "24 22 0:22 / /srv/with\\040blank rw - btrfs /dev/c rw\n"
        "nonsense\n"
    )
    assert mount_of("/srv/x", info) == ("xfs", "/srv")
    assert mount_of("/srvx", info) == ("ext4", "/")
    assert mount_of("/srv/with blank/y", info) == ("btrfs", "/srv/with blank")


def test_defaults_come_from_the_settings(mocker) -> None:
    mocker.patch.object(settings, "load", return_value=Settings(sources=("/etc/wnodes/wnodes.yaml",)))
    assert doctor.examine(FakeHost())[0] == Finding("settings", State.OK, "/etc/wnodes/wnodes.yaml")


LVM = ["qemu-img", "sshfs", "mke2fs", "lvs", "blkdiscard"]


@pytest.mark.parametrize(
    ("facts", "state", "seen", "advice"),
    [
        ({}, State.PROBLEM, "no lvs or no blkdiscard", "install lvm2"),
        ({"programs": LVM}, State.OK, "volumes of vg0 in thin pool p", ""),
        ({"programs": LVM, "volumes": [("it queues writes", "lvchange")]}, State.NOTICE, "it queues", "lvchange"),
        ({"programs": LVM, "volumes": HostError("no thin pool", hint="name one")}, State.PROBLEM, "no thin pool", "name one"),
        ({"programs": LVM, "volumes": TransientError("permission")}, State.NOTICE, "permission", "ask as root"),
    ],
)
def test_scratch_on_volumes(facts: dict[str, Any], state: State, seen: str, advice: str) -> None:
    site = replace(Settings(), scratch=ScratchSettings(volume_group="vg0", thin_pool="p"))
    found = examine(FakeHost(**facts), lambda: site)["scratch"]
    assert found.state is state and seen in found.seen and advice in found.advice
