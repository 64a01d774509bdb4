"""The systemd unit names the wnodesd of this very installation."""

import configparser
import sys
from pathlib import Path

from wnodes_core.agent import server


def test_the_unit_starts_the_installed_daemon_and_spares_what_runs_in_leases():
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read_string(server.unit())
    service = parser["Service"]
    assert service["ExecStart"].split()[0] == str(Path(sys.executable).parent / "wnodesd")
    assert service["KillMode"] == "process"
    assert service["RuntimeDirectoryPreserve"] == "yes"
