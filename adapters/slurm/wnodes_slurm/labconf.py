"""The texts of a Slurm lab: slurm.conf, cgroup.conf, munged's command, free ports."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wnodes_slurm.lab import Lab

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=slurm
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/munge.socket
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/{track}
TaskPlugin=task/{task}
JobAcctGatherType=jobacct_gather/{gather}
JobAcctGatherFrequency=task=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={mem_per_cpu}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=30
SlurmctldTimeout=30
InactiveLimit=0
KillWait={kill_wait_s}
PlugStackConfig={folder}/plugstack.conf
"""
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainRAMSpace=yes
ConstrainCores=yes
"""


def slurm_conf(lab: Lab, ports: dict[str, int]) -> str:
    """The lab's slurm.conf."""
    host = socket.gethostname().partition(".")[0]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    memory = lab.memory_mib or (total - 512) // lab.nodes
    head = SLURM_CONF.format(
        host=host,
        folder=lab.folder,
        ctld_port=ports["ctld"],
        track="cgroup" if lab.cgroup else "linuxproc",
        task="cgroup" if lab.cgroup else "none",
        gather=lab.gather,
        mem_per_cpu=lab.mem_per_cpu_mib,
        kill_wait_s=lab.kill_wait_s,
    )
    feature = f" Feature={lab.features}" if lab.features else ""
    nodes = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[node]}"
        f" CPUs={lab.cpus} RealMemory={memory} State=UNKNOWN{feature}"
        for node in lab.node_names
    ]
    tail = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO"
    return head + "\n".join([*lab.extra, *nodes, tail, ""])


def munged_argv(munge_socket: Path) -> list[str]:
    """munged in the foreground, as its own user (run as root it refuses a key that root does not own)."""
    folder = munge_socket.parent
    become = ["setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups", "--"]
    options = {"socket": munge_socket, "key-file": folder / "munge.key", "seed-file": folder / "munged.seed"}
    options |= {"pid-file": folder / "munged.pid", "log-file": folder / "munged.log"}
    return [*become, "munged", "--foreground", *(f"--{k}={v}" for k, v in options.items())]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, below the range from which srun takes its own."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found += [port] if port not in found else []
    return found
