"""How the bootstrap gets to run in a guest that is not ours: texts and argv for the VM's side.

``builtin``: the image starts it itself (PID 1, or ``wnodes-agent.service``). ``cloud-init``: it
comes with the user-data. ``qemu-ga``: it is sent and started through QEMU's guest agent.
Afterwards all three are the same.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from wnodes_core.guest import bundle

PORT = "org.wnodes.agent.0"
UNIT = "wnodes-agent.service"
PATH = "/run/wnodes-bootstrap"  # /run is writable and may run programs on every distribution we know


def bootstrap_text() -> str:
    """The bootstrap program, for an image builder to install."""
    return bundle.read("guest_bootstrap")


def unit_text() -> str:
    """The systemd unit of an image that has the bootstrap in /usr/lib/wnodes/bootstrap."""
    return bundle.read(UNIT)


def shim_text() -> str:
    """The program that stands for host commands in the guest; goes into ``setup``."""
    return bundle.read("guest_shim.py")


def user_data() -> str:
    """cloud-init user-data (``#cloud-config``) that starts the bootstrap; JSON is YAML enough.

    bootcmd runs early in cloud-init, long before the network is waited for.
    """
    return "#cloud-config\n" + json.dumps({"bootcmd": [_written_and_started(bootstrap_text())]}, indent=1) + "\n"


def meta_data(instance: str) -> str:
    """cloud-init meta-data: a fresh instance id makes it run even in a used image."""
    return json.dumps({"instance-id": instance, "local-hostname": instance}) + "\n"


def guest_agent_commands() -> Iterator[dict[str, Any]]:
    """The guest-exec of QEMU's guest agent that starts the bootstrap.

    Each is one JSON command for ``virDomainQemuAgentCommand``. guest-exec alone is used: the
    guest-file calls are forbidden on many distributions, and exec on some (then image or cloud-init).
    """
    # At high priority: the guest still boots, and at equal rights with all its services ours took 6 s to
    # answer instead of 1.3. The agent gives it back when it runs (guest_agent.serve).
    yield {
        "execute": "guest-exec",
        "arguments": {
            "path": "/usr/bin/nice",
            "arg": ["-n", "-15", _PY, "-IS", "-c", _STARTED_FROM_STDIN],
            "input-data": base64.b64encode(bootstrap_text().encode()).decode(),
        },
    }


# Nobody may wait for our pipes: cloud-init and qemu-ga both read their children's to the end.
_DETACH = "_=os.fork() and os._exit(0);os.setsid();n=os.open(os.devnull,os.O_RDWR);[os.dup2(n,i) for i in (0,1,2)]"
# -S: our programs need no site-packages, and a guest that still boots has no time to look for them.
_PY = "/usr/bin/python3"
# No second start of Python: under emulation each takes 0.7 s.
_STARTED_FROM_STDIN = (
    f"import os,sys;s=sys.stdin.read();{_DETACH};exec(compile(s,'wnodes-bootstrap','exec'),{{'__name__':'__main__'}})"
)


def _written_and_started(text: str) -> list[str]:
    """A short argv for what will run, with the text in a file: cloud-init logs its commands."""
    script = base64.b64encode(text.encode()).decode()
    write = f"import base64,os;open({PATH!r},'wb').write(base64.b64decode({script!r}))"
    return [_PY, "-IS", "-c", f"{write};{_DETACH};os.execv({_PY!r},[{_PY!r},'-IS',{PATH!r}])"]
