"""The systemd unit names the wnodesd of this very installation."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

from wnodes_core.agent import server


def test_the_unit_starts_the_installed_daemon_and_spares_what_runs_in_leases():
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read_string(server.unit())
    service = parser["Service"]
    assert service["ExecStart"].split()[0] == str(Path(sys.executable).parent / "wnodesd")
    assert service["KillMode"] == "process"
    assert service["RuntimeDirectoryPreserve"] == "yes"


def configured_in(unit):
    return [line.partition("=")[0] for line in unit.splitlines() if "=" in line and line[0] != "#"]


@pytest.mark.parametrize("name", server.DROP_INS)
def test_a_drop_in_is_printed_and_adds_to_lists_or_says_no(name):
    argv = [str(Path(sys.executable).parent / "wnodesd"), "--print-drop-in", name]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert printed == server.drop_in(name)
    said = [line.partition("=") for line in printed.splitlines() if line and line[0] not in "#["]
    assert {key for key, _, value in said if value != "no"} <= {"CapabilityBoundingSet", "DeviceAllow", "ReadWritePaths"}
    assert {key for key, _, value in said if value == "no"} <= set(configured_in(server.unit()))
    assert all(value for _, _, value in said), "an empty value would take the unit's own away"
