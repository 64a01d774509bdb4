"""Which network a job may be in, where and how fast; the settings of networks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wnodes_core import policy
from wnodes_core.errors import (
    BadRequest,
    LimitExceeded,
    NetworkDenied,
    NetworkNotHere,
    SettingsError,
    UnknownNetwork,
    Verdict,
)
from wnodes_core.model import Job, VmRequest
from wnodes_core.settings import Settings, load, show

JOB = Job("slurm", "12", "wn17", 1000, 1000, "ann", queue="long", account="cms")
SITE = """
policy:
  - {accounts: [cms], networks: ["cms-*", user], default_network: cms-lan}
  - {accounts: [atlas], networks: []}
network:
  networks:
    - {name: cms-lan, nodes: ["wn1*"], uplink: eth1, vlan: 42, rate_mbit: 100, range: [10.42.7.0/26], subnet: [10.42.0.0/16], gateway: [10.42.0.1]}
    - {name: cms-far, nodes: ["wn2*"], uplink: eth1, vlan: 43}
    - {name: atlas-lan, uplink: eth1, vlan: 44, access: closed, allow: [10.9.0.0/24], subnet: [10.44.0.0/16]}
"""


def site(folder: Path, text: str = SITE) -> Settings:
    file = folder / "wnodes.yaml"
    file.write_text(text)
    folder.chmod(0o755)
    return load(file)


def admit(settings: Settings, text: str, **job: str) -> VmRequest:
    request = VmRequest.parse("image=el9" + ("," + text if text else ""))
    return policy.admit(request, Job(**{**JOB.to_dict(), **job}), settings)


def test_the_default_is_none() -> None:
    assert admit(Settings(), "").network == ""
    assert admit(Settings(), "network=none").network == ""
    assert admit(Settings(), "network=user").network == "user"


def test_a_rule_gives_a_network_and_closes_others(tmp_path: Path) -> None:
    settings = site(tmp_path)
    assert admit(settings, "").network == "cms-lan"
    assert admit(settings, "network=none").network == ""
    with pytest.raises(NetworkDenied, match="'atlas-lan' is not allowed for you here: want one of cms-\\*, user, none, cms-lan"):
        admit(settings, "network=atlas-lan")


def test_where_the_policy_is_silent_a_site_s_network_is_closed(tmp_path: Path) -> None:
    settings = site(tmp_path)
    with pytest.raises(NetworkDenied, match="want one of none, user"):
        admit(settings, "network=cms-lan", account="other")
    with pytest.raises(NetworkDenied):
        admit(settings, "network=user", account="atlas")


def test_an_unknown_network_is_told_with_those_that_are_here(tmp_path: Path) -> None:
    with pytest.raises(UnknownNetwork, match="'cms-typo': no such network on this node: want one of none, user, cms-lan, atlas-lan"):
        admit(site(tmp_path), "network=cms-typo")


def test_a_vlan_that_is_confined_elsewhere_sends_the_job_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(NetworkNotHere, match="'cms-far' is confined to other nodes than 'wn17'") as caught:
        admit(site(tmp_path), "network=cms-far")
    assert caught.value.verdict is Verdict.REQUEUE
    assert site(tmp_path).network.here("wn17") == ("cms-lan", "atlas-lan")
    assert site(tmp_path).network.here("wn20") == ("cms-far", "atlas-lan")


def test_rates(tmp_path: Path) -> None:
    settings = site(tmp_path)
    assert admit(settings, "rate=50M").rate_mbit == 50
    with pytest.raises(LimitExceeded, match="rate 1000 Mbit/s asked for, network 'cms-lan' allows 100"):
        admit(settings, "rate=1G")
    with pytest.raises(BadRequest, match="network 'user' has no limit"):
        admit(settings, "network=user,rate=10")
    with pytest.raises(BadRequest, match="want Mbit a second"):
        VmRequest.parse("rate=fast")
    port = settings.network.port_for("cms-lan", 50, "lease", 1000)
    assert port is not None
    assert (port.rate_mbit, port.kind, port.uplink, port.gateways) == (50, "bridge", "eth1", ("10.42.0.1",))
    assert settings.network.port_for("cms-lan", None, "lease", 1000).rate_mbit == 100  # type: ignore[union-attr]


def test_a_closed_network_s_port_says_what_it_may_reach(tmp_path: Path) -> None:
    port = site(tmp_path).network.port_for("atlas-lan", None, "l", 1)
    assert port is not None
    assert (port.closed, port.allow) == (True, ("10.44.0.0/16", "10.9.0.0/24"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{name: user, vlan: 1, uplink: e}", "not none or user"),
        ("{name: a, vlan: 4095, uplink: e}", "network.networks\\[0\\].vlan: '4095': want a VLAN from 1 to 4094"),
        ("{name: a, vlan: 9-3, uplink: e}", "span as in 100-199"),
        ("{name: a, vlan: 7}", "a VLAN wants an uplink"),
        ("{name: a, kind: ovs}", "kind ovs wants a bridge"),
        ("{name: a, kind: pci}", "wants devices"),
        ("{name: a, uplink: a/../b}", "name of a network device"),
        ("{name: a, uplink: averylongdevicename}", "at most 15"),
        ("{name: a, range: [10.0.0.0/24]}", "10.0.0.1 is in none of its subnets"),
        ("{name: a, subnet: [10.0.0.0/24], gateway: [10.0.1.1]}", "10.0.1.1 is in none"),
        ("{name: a, subnet: [10.0.0.0/24, 10.1.0.0/24]}", "want one subnet a family"),
        ("{name: a, range: [10.0.0.9-10.0.0.3], subnet: [10.0.0.0/24]}", "the lower one first"),
        ("{name: a, access: ajar}", "want open or closed"),
        ("{name: a, vlam: 3}", "unknown key 'vlam' in network.networks\\[0\\]"),
        ("{kind: bridge}", "a network without a name"),
        ("{name: a}, {name: a}", "network a is there twice"),
    ],
)
def test_a_wrong_network_is_an_error_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=rf"wnodes.yaml:\d+:\d+: .*{words}"):
        site(tmp_path, f"network:\n  networks: [\n    {text}]\n".replace("networks[\n", "networks:\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node_range: 10.0.0.0/8", "within 169.254.0.0/16"),
        ("node_address: 169.254.80.9", "is one of node_range"),
        ("node_ports: [0]", "want a TCP port"),
    ],
)
def test_the_way_to_the_node_is_link_local(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        site(tmp_path, "network: {" + text + "}\n")


def test_networks_are_shown_and_survive_being_written(tmp_path: Path) -> None:
    settings = site(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    assert site(again, show.dump(settings)) == settings
    rows = {row.key: row.value for row in show.rows(settings)}
    assert rows["network.networks[1].nodes"] == ["wn2*"]


def test_the_sample_of_the_documentation_loads(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/network.md").read_text()
    (sample,) = re.findall(r"(?ms)^```yaml settings\n(.*?)^```$", text)
    assert site(tmp_path, sample).network.here("wn17") == ("cms-lan", "alone", "fast")


def test_the_sample_of_the_page_on_storage_loads(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/storage.md").read_text()
    (sample,) = re.findall(r"(?ms)^```yaml settings\n(.*?)^```$", text)
    found = site(tmp_path, sample).scratch
    assert (found.volume_group, found.thin_pool) == ("vg0", "scratch")
