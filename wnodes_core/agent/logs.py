"""Structured logs: one JSON object a line on stderr (journald keeps them), or text for people."""

from __future__ import annotations

import json
import logging
import sys
import time

FIELDS = ("event", "lease", "job", "uid", "account", "reason", "error", "seconds")


class JsonFormatter(logging.Formatter):
    """One JSON object a record, with lease, job and event where the caller gave them."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, object] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line.update({name: getattr(record, name) for name in FIELDS if hasattr(record, name)})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The same record for people: message, then the fields as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line (and a traceback's)."""
        fields = "".join(f" {name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name))
        return f"wnodesd: {record.levelname.lower()}: {super().format(record)}{fields}"


def set_up(style: str, level: str) -> None:
    """Send all our records to stderr as ``json`` or ``text``, from ``level`` upwards."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
