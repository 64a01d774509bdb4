"""lsf.conf and lsb.queues in their real formats, as far as the simulator heeds them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Conf:
    """A cluster's files: all below ``LSF_ENVDIR``."""

    envdir: str
    values: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Conf:
        """From ``LSF_ENVDIR`` in the environment (D). Exits with LSF's way of saying no if it is not there."""
        envdir = os.environ.get("LSF_ENVDIR", "/etc")
        try:
            text = Path(envdir, "lsf.conf").read_text()
        except OSError as error:
            raise SystemExit(f"{envdir}/lsf.conf: {error.strerror}") from None
        return cls(envdir, dict(re.findall(r"(?m)^\s*([A-Z_]+)\s*=\s*(.*?)\s*$", text)))

    def get(self, name: str, default: str = "") -> str:
        """A parameter of lsf.conf."""
        return self.values.get(name, default)

    @property
    def documented(self) -> bool:
        """Whether to follow IBM's documents (D) where the descendant (T) differs."""
        return self.get("LSB_SIM_RELEASE", "T") == "D"

    @property
    def serverdir(self) -> str:
        """Where esub, eexec and elim are looked for (D)."""
        return self.get("LSF_SERVERDIR")

    @property
    def socket(self) -> str:
        """mbatchd's socket; sbatchd's is beside it."""
        return f"{self.get('LSB_SHAREDIR')}/mbatchd.sock"

    @property
    def sbatchd_socket(self) -> str:
        """Where sbatchd hears mbatchd."""
        return f"{self.get('LSB_SHAREDIR')}/sbatchd.sock"

    @property
    def host(self) -> str:
        """This host's name, as LSF calls it."""
        return self.get("LSB_SIM_HOST") or os.uname().nodename

    def seconds(self, name: str, default: float) -> float:
        """A time of lsf.conf in seconds; tests make them short."""
        return float(self.get(name) or default)

    def queues(self) -> dict[str, dict[str, str]]:
        """The queues of lsb.queues, in order (D: Begin Queue … End Queue, NAME = value, # comments)."""
        text = Path(self.envdir, "lsb.queues").read_text()
        found = {}
        for block in re.findall(r"(?ms)^\s*Begin Queue\s*$(.*?)^\s*End Queue\s*$", text):
            lines = [line for line in block.splitlines() if not line.lstrip().startswith("#")]
            pairs = [line.partition("=") for line in lines if "=" in line]
            queue = {name.strip().upper(): value.strip() for name, _, value in pairs}
            found[queue["QUEUE_NAME"]] = queue
        return found
