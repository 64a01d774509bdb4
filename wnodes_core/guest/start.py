"""How the bootstrap gets to run in a guest that is not ours: texts and argv for the VM's side.

``builtin``: the image starts it itself (PID 1, or ``wnodes-agent.service``). ``cloud-init``: it
comes with the user-data. ``qemu-ga``: it is written and started through QEMU's guest agent.
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
    script = base64.b64encode(bootstrap_text().encode()).decode()
    python = _starter(f"import base64;open({PATH!r},'wb').write(base64.b64decode({script!r}))")
    return "#cloud-config\n" + json.dumps({"bootcmd": [python]}, indent=1) + "\n"


def meta_data(instance: str) -> str:
    """cloud-init meta-data: a fresh instance id makes it run even in a used image."""
    return json.dumps({"instance-id": instance, "local-hostname": instance}) + "\n"


def guest_agent_commands() -> Iterator[dict[str, Any]]:
    """The guest-exec of QEMU's guest agent that writes and starts the bootstrap.

    Each is one JSON command for ``virDomainQemuAgentCommand``. guest-exec alone is used: the
    guest-file calls are forbidden on many distributions, and exec on some (then image or cloud-init).
    """
    yield {
        "execute": "guest-exec",
        "arguments": {
            "path": "/usr/bin/python3",
            "arg": ["-I", "-c", _started_from_stdin()],
            "input-data": base64.b64encode(bootstrap_text().encode()).decode(),
        },
    }


def _starter(first: str) -> list[str]:
    fork = "_=os.fork() and os._exit(0);os.setsid()"
    become = f"os.execv({_PY!r},[{_PY!r},'-I',{PATH!r}])"
    return [_PY, "-I", "-c", f"import os,sys;{first};{fork};{_DETACH};{become}"]


def _started_from_stdin() -> str:
    return _starter(f"open({PATH!r},'w').write(sys.stdin.read())")[3]


_PY = "/usr/bin/python3"
# Nobody may wait for our pipes: cloud-init and qemu-ga both read their children's to the end.
_DETACH = "n=os.open(os.devnull,os.O_RDWR);[os.dup2(n,i) for i in (0,1,2)]"
