"""Errors are verdicts: each says what must happen to the job and to the host.

::

    WnodesError(message, *, hint)        HOLD       stop the job with a message; never retried unseen
    ├── RequestError                     HOLD       the user asked for something that cannot be had
    │   ├── BadRequest                              malformed text
    │   ├── UnknownImage  AmbiguousImage            no image, or several, of that name
    │   ├── UnknownNetwork                          no network of that name
    │   ├── ImageDenied  MountDenied  NetworkDenied  outside the site's policy
    │   └── LimitExceeded                           more than the job or the site allows
    ├── ImageError                       HOLD       the image itself is wrong
    │   ├── DigestMismatch  BadFormat
    ├── SettingsError                    HOLD       the site's configuration is wrong; names file and line
    ├── TransientError                   REQUEUE    may work elsewhere or later; the second becomes HOLD
    │   ├── FetchError  BootTimeout  GuestPanic  ChannelLost  HostBusy  IdentityError
    ├── FailedAgain                      HOLD       a TransientError for which the job was requeued once already
    │   ├── NetworkNotHere                          this node may not carry it
    ├── HostError                        DRAIN      only code that has proved the host sick may raise it
    │   ├── NoKvm  StateDirFull  LibvirtDown
    ├── PluginError                      HOLD       BrokenPlugin  NoProvider
    └── CommandError                     REQUEUE    a program failed; callers translate it

Anything that is not a WnodesError is a bug: traceback to the log, job held, host kept.
"""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """What an error means for the job (HOLD, REQUEUE) or for the worker node (DRAIN)."""

    HOLD = "hold"
    REQUEUE = "requeue"
    DRAIN = "drain"


class WnodesError(Exception):
    """Base of all our errors: what was tried, the offending value, what is wanted.

    ``hint`` is one further sentence on what to do about it, shown on its own line.
    """

    verdict = Verdict.HOLD
    again = False  # wnodesd's decision, bounded: the batch system is to run the job anew

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message

    def to_dict(self) -> dict[str, str]:
        """The error as it crosses a socket: kind, message, hint."""
        again = {"again": "yes"} if self.again else {}
        return {"kind": type(self).__name__, "message": self.message, "hint": self.hint, **again}


class RequestError(WnodesError):
    """The user asked for something that cannot be had."""


class BadRequest(RequestError):
    """The request's text is malformed."""


class UnknownImage(RequestError):
    """No image has that name."""


class AmbiguousImage(RequestError):
    """More than one image answers to that name."""


class ImageDenied(RequestError):
    """The image exists, but not for this user."""


class MountDenied(RequestError):
    """The mount is outside the site's policy, or malformed."""


class NetworkDenied(RequestError):
    """The network exists, but not for this user."""


class UnknownNetwork(RequestError):
    """No network has that name."""


class LimitExceeded(RequestError):
    """More cpus, memory or disk than the job has or the site allows."""


class ImageError(WnodesError):
    """The image itself is wrong."""


class DigestMismatch(ImageError):
    """The bytes are not those the catalogue promised."""


class BadFormat(ImageError):
    """Not a disk image of a format we start."""


class SettingsError(WnodesError):
    """The site's configuration is wrong; the message names file and line."""


class TransientError(WnodesError):
    """May work elsewhere or later. A second REQUEUE of the same job becomes HOLD."""

    verdict = Verdict.REQUEUE


class FetchError(TransientError):
    """An image could not be fetched from any of its sources."""


class BootTimeout(TransientError):
    """The guest never answered."""


class GuestPanic(TransientError):
    """The guest's kernel panicked, or QEMU died under it."""


class ChannelLost(TransientError):
    """The channel to the guest broke while the job ran."""


class HostBusy(TransientError):
    """The node has no room for the VM right now."""


class NetworkNotHere(TransientError):
    """The site confines the network to other nodes than this one."""


class IdentityError(TransientError):
    """A clone is not what it was told to be, or still what its template was."""


class FailedAgain(WnodesError):
    """A TransientError of a job that was requeued for one already."""


class HostError(WnodesError):
    """The host is sick, and the raising code has proved it."""

    verdict = Verdict.DRAIN


class NoKvm(HostError):
    """KVM was demanded and does not run a probe guest here."""


class StateDirFull(HostError):
    """The file system below our state folder is full."""


class LibvirtDown(HostError):
    """libvirt or QEMU is missing or does not start here."""


class PluginError(WnodesError):
    """A plug-in is broken or missing."""


class BrokenPlugin(PluginError):
    """A plug-in failed to load or broke its contract."""


class NoProvider(PluginError):
    """No plug-in provides what was asked for."""


class CommandError(WnodesError):
    """A program failed. Callers translate it; it should not reach a user."""

    verdict = Verdict.REQUEUE

    def __init__(
        self,
        argv: list[str],
        exit_code: int | None,
        stderr_tail: str,
        *,
        timeout_s: float | None = None,
    ) -> None:
        what = f"no answer within {timeout_s:g} s" if exit_code is None else f"exit code {exit_code}"
        super().__init__(f"{argv[0]}: {what}: {stderr_tail.strip()[-600:] or 'no message'}")
        self.argv = argv
        self.exit_code = exit_code
        self.stderr_tail = stderr_tail


def kinds(cls: type[WnodesError] = WnodesError) -> dict[str, type[WnodesError]]:
    """Every kind of error there is, by its name."""
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found.update(kinds(child))
    return found


def from_dict(data: dict[str, object]) -> WnodesError:
    """Rebuild an error that crossed a socket; an unknown kind becomes a plain WnodesError."""
    kind = kinds().get(str(data.get("kind")), WnodesError)
    if kind is CommandError:
        kind = TransientError
    error = kind(str(data.get("message", "no message")), hint=str(data.get("hint", "")))
    error.again = data.get("again") == "yes"
    return error
