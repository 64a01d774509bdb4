"""Ask the hypervisor backend once what this host can run, in a process of its own.

The backend imports libvirt (tens of MiB); wnodesd runs this and keeps only the answer.
Usage: ``python -I -m wnodes_core.agent.probe ACCEL FOLDER``; prints one JSON object.
"""

from __future__ import annotations

import json
import sys

from wnodes_core.errors import NoProvider, WnodesError
from wnodes_core.plugins import Plugins


def main() -> int:
    """Print the backend's facts, or ``{"error": …}``."""
    accel, folder, *disabled = sys.argv[1:]
    try:
        answer = Plugins(disabled=disabled).hook.wnodes_vm_probe(accel=accel, folder=folder)
        if answer is None:
            raise NoProvider("no hypervisor backend is installed", hint="wnodes doctor")
    except WnodesError as error:
        answer = {"error": error.to_dict()}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
