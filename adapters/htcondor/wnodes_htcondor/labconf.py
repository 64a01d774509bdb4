"""The configuration of an HTCondor lab: one host, loopback only, quick."""

from __future__ import annotations

import os
import pwd
import random
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wnodes_htcondor.lab import Lab

CONDOR_CONFIG = """\
RELEASE_DIR = {prefix}/usr
LOCAL_DIR = {folder}
BIN = $(RELEASE_DIR)/bin
SBIN = $(RELEASE_DIR)/sbin
LIB = $(RELEASE_DIR)/lib/condor
LIBEXEC = $(RELEASE_DIR)/libexec/condor
SHARE = $(RELEASE_DIR)/share/condor
ETC = $(LOCAL_DIR)
LOG = $(LOCAL_DIR)/log
SPOOL = $(LOCAL_DIR)/spool
EXECUTE = $(LOCAL_DIR)/execute
LOCK = $(LOCAL_DIR)/lock
RUN = $(LOCAL_DIR)/run
LOCAL_CONFIG_FILE =
REQUIRE_LOCAL_CONFIG_FILE = False
LOCAL_CONFIG_DIR = $(LOCAL_DIR)/config.d
DAEMON_LIST = MASTER COLLECTOR NEGOTIATOR SCHEDD STARTD
# As root condor_master would rewrite the host's sysctls (port range, pid_max, dirty_bytes, ...).
ENABLE_KERNEL_TUNING = False

NETWORK_INTERFACE = 127.0.0.1
BIND_ALL_INTERFACES = False
ENABLE_IPV4 = True
ENABLE_IPV6 = False
CONDOR_HOST = 127.0.0.1
COLLECTOR_HOST = 127.0.0.1:{port}
NETWORK_HOSTNAME = localhost
UID_DOMAIN = wnodes.lab
FILESYSTEM_DOMAIN = wnodes.lab
TRUST_UID_DOMAIN = True

SEC_DEFAULT_AUTHENTICATION = REQUIRED
SEC_DEFAULT_AUTHENTICATION_METHODS = FS
FS_REMOTE_DIR = {folder}/lock
ALLOW_ADMINISTRATOR = {admins}
ALLOW_DAEMON = {admins}
ALLOW_NEGOTIATOR = {admins}
ALLOW_READ = *
ALLOW_WRITE = *

# A negotiation cycle begins at once on each submission: 1.1 s to running; with the defaults 19 s.
NEGOTIATOR_INTERVAL = 10
NEGOTIATOR_CYCLE_DELAY = 0
NEGOTIATOR_MIN_INTERVAL = 0
SCHEDD_INTERVAL = 10
SCHEDD_MIN_INTERVAL = 0
PERIODIC_EXPR_INTERVAL = 2
SYSTEM_PERIODIC_EXPR_INTERVAL = 2
UPDATE_INTERVAL = 5
POLLING_INTERVAL = 2
STARTER_UPDATE_INTERVAL = 5
STARTER_INITIAL_UPDATE_INTERVAL = 2
SHADOW_QUEUE_UPDATE_INTERVAL = 5
MASTER_BACKOFF_CONSTANT = 1
MASTER_BACKOFF_CEILING = 5
CLAIM_WORKLIFE = 0
RUNBENCHMARKS = False

NUM_CPUS = {cpus}
MEMORY = {memory_mib}
NUM_SLOTS = 1
NUM_SLOTS_TYPE_1 = 1
SLOT_TYPE_1 = 100%
SLOT_TYPE_1_PARTITIONABLE = True
START = True
SUSPEND = False
PREEMPT = False
KILL = False
MachineMaxVacateTime = {kill_wait_s}
"""


def condor_config(lab: Lab) -> str:
    """The lab's condor_config."""
    port = lab.port or free_port()
    admins = "condor@* root@*" if os.getuid() == 0 else f"{pwd.getpwuid(os.getuid()).pw_name}@*"
    head = CONDOR_CONFIG.format(
        prefix=lab.prefix,
        folder=lab.folder,
        port=port,
        admins=admins,
        cpus=lab.cpus,
        memory_mib=lab.memory_mib,
        kill_wait_s=lab.kill_wait_s,
    )
    return head + "".join(f"{line}\n" for line in lab.extra)


def free_port() -> int:
    """A port that nobody listens on now, below the range from which the kernel gives ports away."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
