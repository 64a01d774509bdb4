"""What a worker node can do for the networks of its settings, for ``doctor``."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from wnodes_core.doctor_host import Host
from wnodes_core.settings import Settings
from wnodes_core.settings.network import NetworkRule

_FILTERS_EVERYTHING = "/proc/sys/net/bridge/bridge-nf-call-iptables"


def possible(host: Host) -> str:
    """The kinds of networks that this node could carry, in words."""
    kinds = ["user"]
    if host.program("ip") and host.program("nft"):
        kinds.append("bridge with VLANs" if _has_vlans(host) else "bridge without VLANs")
        if host.program("ovs-vsctl"):
            kinds.append("ovs")
    if host.stat("/sys/kernel/iommu_groups/0"):
        kinds.append("pci")
    return ", ".join(kinds)


def missing(host: Host, settings: Settings) -> Iterator[tuple[str, str]]:
    """What the networks that this node is to carry lack, each with what to do about it."""
    networks = [rule for rule in settings.network.networks if rule.carried_by(host.node_name())]
    for rule in networks:
        yield from ((f"{rule.name}: {seen}", advice) for seen, advice in _lacks(host, rule))
    if any(rule.kind in ("bridge", "ovs") for rule in networks):
        yield from _tun(host)


def slows(host: Host) -> str:
    """What the node does to bridged frames that it should leave alone, or ''."""
    if host.text(_FILTERS_EVERYTHING).strip() == "1":
        return "bridge-nf-call-iptables is 1: the host's own iptables rules judge guests' frames, too"
    return ""


def _lacks(host: Host, rule: NetworkRule) -> Iterator[tuple[str, str]]:
    if rule.kind in ("bridge", "ovs"):
        for program, package in (("ip", "iproute2"), ("nft", "nftables")):
            if not host.program(program):
                yield f"no {program}", f"install {package}"
    if rule.kind == "ovs" and not host.program("ovs-vsctl"):
        yield "no ovs-vsctl", "install openvswitch-switch (EL: openvswitch)"
    if rule.kind == "bridge" and rule.vlan and not _has_vlans(host):
        yield "this kernel has no 8021q", "use one that has, or kind: ovs"
    if rule.kind == "pci" and not host.stat("/sys/kernel/iommu_groups/0"):
        yield "no IOMMU", "intel_iommu=on or amd_iommu=on for the kernel, VT-d or AMD-Vi in the firmware"
    if rule.uplink and not host.stat(f"/sys/class/net/{rule.uplink}"):
        yield f"no device {rule.uplink}", "name the device in the network's uplink, or this node not in its nodes"


def _has_vlans(host: Host) -> bool:
    return bool(host.stat("/proc/net/vlan") or host.glob("/lib/modules/*/kernel/net/8021q/8021q.ko*"))


def _tun(host: Host) -> Iterator[tuple[str, str]]:
    found = host.stat("/dev/net/tun")
    if found is None:
        yield "no /dev/net/tun", "modprobe tun"
    elif not found.st_mode & stat.S_IWOTH:
        # A tap is only its owner's; the device itself gives nobody anything (udev makes it 0666).
        yield f"/dev/net/tun is {stat.filemode(found.st_mode)}: QEMU runs as the job's user", "chmod 666 /dev/net/tun"
