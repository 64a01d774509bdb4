"""Hooks that tell: each call of esub, eexec, PRE and POST leaves a line and its environment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from wnodes_lsf.simulator import lab
from wnodes_lsf.testing import USER, until

HOOK = """\
#!/bin/sh
name=$1; shift
[ -n "$name" ] || name=${{0##*/}}
{python} -I - "$name" "$@" 3<&0 <<'END'
import json, os, sys
data = os.read(3, 1 << 21) if sys.argv[1] in ("eexec",) else b""
while data and len(data) < 1 << 22 and (more := os.read(3, 1 << 20)):
    data += more
def text(path):
    try:
        return open(path, "rb").read().decode("latin-1")
    except OSError:
        return None
facts = {{"name": sys.argv[1], "argv": sys.argv[2:], "uid": os.getuid(), "cwd": os.getcwd()}}
facts |= {{"size": len(data), "head": data[:20].hex(), "environ": dict(os.environ), "group": os.getpgrp()}}
facts["parm"] = text(os.environ.get("LSB_SUB_PARM_FILE", ""))
facts["stdio"] = [os.readlink("/proc/self/fd/%d" % n) for n in (1, 2)]
os.write(os.open("{record}", os.O_WRONLY | os.O_APPEND), json.dumps(facts).encode() + b"\\n")
END
"""
QUEUES = """\
Begin Queue
QUEUE_NAME = normal
End Queue

Begin Queue
QUEUE_NAME = hooked
PRE_EXEC = {hook} queue-pre && {folder}/pre
POST_EXEC = {hook} queue-post
REQUEUE_EXIT_VALUES = 77
End Queue

Begin Queue
QUEUE_NAME = quoted
JOB_STARTER = exec {folder}/starter '%USRCMD'
End Queue

Begin Queue
QUEUE_NAME = double
JOB_STARTER = {folder}/starter "%USRCMD"
End Queue

Begin Queue
QUEUE_NAME = prefix
JOB_STARTER = {folder}/starter
End Queue

Begin Queue
QUEUE_NAME = controls
JOB_CONTROLS = SUSPEND[SIGTSTP] TERMINATE[touch {folder}/terminated-$LSB_JOBPGIDS]
End Queue
"""


class Recorder(lab.Lab):
    """A lab whose hooks record; ``pre`` and ``starter`` are scripts that a test may rewrite."""

    def __init__(self, folder: Path, **options: Any) -> None:
        hook = folder / "hook"
        queues = QUEUES.format(hook=hook, folder=folder)
        short = {
            "JOB_TERMINATE_INTERVAL": 0.4,
            "LSB_SIM_MINUTE": 0.1,
            "LSB_SIM_RUNLIMIT_GRACE": 0.4,
            "LSB_SIM_PRE_RETRY": 0.3,
        }
        super().__init__(folder, queues=queues, **{**short, **options})
        self.record = folder / "record"
        self.work = folder / "jobs"

    def write(self) -> None:
        """The lab's files and ours."""
        super().write()
        self.work.mkdir()
        shutil.chown(self.work, USER, USER)
        self.record.touch(0o666)
        self.record.chmod(0o666)
        self.program(self.folder / "hook", HOOK.format(python=self.serverdir / "res", record=self.record))
        self.program(self.serverdir / "eexec", f"#!/bin/sh\nexec {self.folder}/hook eexec\n")
        self.program(self.folder / "pre", "#!/bin/sh\nexit 0\n")
        self.program(self.folder / "starter", '#!/bin/sh\nprintf "%s\\n" "starter[$#]:$*"\n')

    @staticmethod
    def program(path: Path, text: str) -> None:
        """An executable script."""
        path.write_text(text)
        path.chmod(0o755)

    def calls(self, *names: str) -> list[dict[str, Any]]:
        """What the hooks noted, of these names, in order."""
        found = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [call for call in found if not names or call["name"] in names]

    def names(self) -> list[str]:
        """Who was called, with eexec's phase."""
        return [
            call["environ"].get("LS_EXEC_T", call["name"]) if call["name"] == "eexec" else call["name"]
            for call in self.calls()
        ]

    def bsub(self, *argv: str, **how: Any) -> str:
        """Submit in the work folder, output to ``out-ID``; the job's id."""
        done = self.run_as(USER, ["bsub", "-o", "out-%J", *argv], cwd=str(self.work), **how)
        return done.text.partition("<")[2].partition(">")[0]

    def show(self, job: str) -> dict[str, str]:
        """The job as bjobs has it."""
        fields = "jobid stat exit_code queue exec_host"
        text = self.run(["bjobs", "-u", "all", "-a", "-json", "-o", fields, job]).text
        return {name.lower(): value for name, value in json.loads(text)["RECORDS"][0].items()}

    def ended(self, job: str) -> dict[str, str]:
        """The job once it is over."""
        until(
            lambda: self.show(job)["stat"] in ("DONE", "EXIT"),
            lambda: f"end of {job}: {self.show(job)} {self.log('sbatchd')}",
            20,
        )
        return self.show(job)

    def output(self, job: str) -> str:
        """What it printed."""
        path = self.work / f"out-{job}"
        return path.read_text() if path.exists() else ""
