"""Templates: guests that were booted once, saved, and are cloned for jobs."""

from wnodes_core.templates.shelf import Kept, Shelf
from wnodes_core.templates.wanted import MOUNT_PORTS, Wanted

__all__ = ["MOUNT_PORTS", "Kept", "Shelf", "Wanted"]
