"""condor_ssh_to_job lands in the VM of a VM job.

Contract (HTCondor 23.9, 25: condor_ssh_to_job_sshd_setup): sshd runs on the host as the job's user, below
its starter. ``ForceCommand`` of its configuration runs us with HTCondor's shell setup and the file of
the job's environment, which lies in the sandbox, where the guest sees it too.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from wnodes_core.errors import WnodesError
from wnodes_htcondor import native, task

# Arguments: the file of the job's environment, the sandbox, the command that the user gave ssh.
_SHELL = """\
. "$1"; cd "${_CONDOR_JOB_IWD:-$2}" || cd "$2"
[ -z "$3" ] || { eval "$3"; exit; }
[ -x /bin/bash ] && exec /bin/bash -l || exec /bin/sh -l
"""


def main(run_dir: str) -> NoReturn:
    """Become the shell, or the command, that the user asked condor_ssh_to_job for."""
    setup, saved = sys.argv[1], sys.argv[2]
    sandbox = os.path.dirname(os.path.dirname(saved))
    if not _in_vm(f"{sandbox}/.job.ad"):
        os.execv(setup, [setup, saved])
    os.chdir(sandbox)
    command = os.environ.get("SSH_ORIGINAL_COMMAND", "")
    sys.argv = [sys.argv[0], task.ENTER, "/bin/sh", "-c", _SHELL, "sh", saved, sandbox, command]
    from wnodes_core.launcher import main as launch

    launch("htcondor", run_dir)


def _in_vm(path: str) -> bool:
    """Whether this is a VM job; one whose ad cannot be read is taken for one, and refused by the launcher."""
    try:
        return native.request_from(task.job_ad({"_CONDOR_JOB_AD": path})) is not None
    except WnodesError:
        return True
