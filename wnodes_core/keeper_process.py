"""What any keeper is as a process, whoever started it: deaf to a step's signals, its words in its lease's folder."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal

SHRUGGED_OFF = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
    signal.SIGUSR2, signal.SIGALRM, signal.SIGTSTP, signal.SIGXCPU, signal.SIGPIPE,
)  # fmt: skip
# The user's soft limits are for the command in the guest: QEMU, which inherits ours, would break on them.
LIFTED = (
    resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE,
    resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC,
)  # fmt: skip
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def settle_in(folder: str) -> None:
    """Become a process that outlives what started it, and the parent of the daemonised QEMU."""
    os.umask(0o077)
    os.chdir(folder)
    for limit in LIFTED:
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (hard, hard))
    for number in SHRUGGED_OFF:
        signal.signal(number, signal.SIG_IGN)
    # libvirt daemonises QEMU; as subreaper we stay its ancestor, which keeps it in the process
    # family that Slurm's proctrack/linuxproc follows.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def log_into(path: str) -> None:
    """Let all that this process says go there."""
    file = open(path, "a", buffering=1)  # noqa: SIM115 - lives as long as we do
    os.dup2(file.fileno(), 2)
    os.dup2(file.fileno(), 1)
    logging.basicConfig(stream=file, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
