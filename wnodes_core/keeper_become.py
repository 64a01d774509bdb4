"""The keeper's part in a second account: what a guest asks with ``wnodes-run-as``, wnodesd decides, we carry out.

``wnodes-run-as ACCOUNT [--] COMMAND [ARGUMENT…]`` in the guest arrives as a stream that the guest opened. wnodesd says
whether and as whom, and serves the account's mounts (``keeper_serving``). In the guest they lie in a folder of root's;
each command sees them at their places in a mount namespace of its own, and sees none of the job's: what it read there,
the host would take for the job's user's doing.
"""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wnodes_core.errors import RequestError, WnodesError
from wnodes_core.guest import frames
from wnodes_core.guest.channel import GuestChannel, decode, encode
from wnodes_core.keeper_lease import Holding
from wnodes_core.keeper_serving import Serving
from wnodes_core.model import Mount
from wnodes_core.plan import Plan
from wnodes_core.policy import inside
from wnodes_core.policy_become import Account

USAGE = "usage: wnodes-run-as ACCOUNT [--] COMMAND [ARGUMENT...]: run a command as another account of this job's site"
_MOST = 64  # commands of other accounts that run at once
_GRACE_S = 2.0  # between TERM and the end, once whoever ran it has been killed
_PATH = "/usr/local/bin:/usr/bin:/bin"
_PASSED = ("TERM", "LANG", "LC_ALL", "TZ")
# Words: how many folders to hide, each; how many mounts to show, each from and to; uid, gid, groups, folder; command.
ENTER = """
set -eu
left=$1; shift
while [ "$left" -gt 0 ]; do umount -l "$1"; shift; left=$((left - 1)); done
left=$1; shift
while [ "$left" -gt 0 ]; do mkdir -p "$2"; mount --bind "$1" "$2"; shift 2; left=$((left - 1)); done
uid=$1 gid=$2 groups=$3 folder=$4
shift 4
cd /
exec setpriv --reuid "$uid" --regid "$gid" --groups "$groups" --inh-caps=-all -- \\
    sh -c 'test "$1" && cd -- "$1" 2>/dev/null || cd -- "$HOME" || cd /; shift; exec "$@"' wnodes-run-as "$folder" "$@"
"""


@dataclass(frozen=True)
class Wish:
    """What somebody in the guest asks for; every word of it is a guest's."""

    account: str
    argv: tuple[str, ...]
    cwd: str
    umask: int
    environ: dict[str, str]

    @classmethod
    def parse(cls, request: dict[str, Any]) -> Wish:
        """Raises RequestError, with the usage."""
        try:
            words = [str(word) for word in request["argv"][1:]]
            given = request.get("environ", {})
            environ = {name: str(given[name])[:200] for name in _PASSED if name in given}
            cwd, umask = str(request.get("cwd", "/")), int(request.get("umask", 0o022)) & 0o777
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise RequestError(f"malformed request; {USAGE}") from None
        if len(words) > 1 and words[1] == "--":
            del words[1]
        if len(words) < 2 or words[0].startswith("-"):
            raise RequestError(USAGE)
        if any("\0" in word for word in (cwd, *words, *environ.values())):
            raise RequestError("malformed request: a NUL in it")
        return cls(words[0], tuple(words[1:]), cwd, umask, environ)


class Accounts:
    """The second accounts of one lease's VM. ``holding`` None: there is no wnodesd."""

    def __init__(self, plan: Plan, channel: GuestChannel, holding: Holding | None) -> None:
        self._plan = plan
        self._channel = channel
        self._serving = Serving(plan, channel, holding) if holding else None
        self._known: dict[str, asyncio.Task[Account]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._one = asyncio.Lock()

    def opened(self, stream: int, request: dict[str, Any]) -> None:
        """The guest has opened a stream to ask for an account."""
        gone = asyncio.Event()

        def heard(kind: int, sub: int, stream: int, payload: Any) -> None:
            if kind == frames.CONTROL:
                gone.set()

        if len(self._tasks) >= _MOST:
            self._end(stream, {"code": 126, "error": f"{_MOST} commands of other accounts run already"})
            return
        self._channel.adopt_stream(stream, heard)
        task = asyncio.ensure_future(self._serve(stream, request, gone))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Serve nobody any more; the gateways are wnodesd's to end."""
        tasks = [*self._tasks, *self._known.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._serving:
            self._serving.close()

    async def _serve(self, stream: int, request: dict[str, Any], gone: asyncio.Event) -> None:
        ending: dict[str, Any] = {"code": 126, "error": "a bug of the keeper's: see its log"}
        try:
            wish = Wish.parse(request)
            account = await self._account(wish.account)
            if not gone.is_set():
                ending = await self._run(stream, wish, account, gone)
        except WnodesError as error:
            hint = f" ({error.hint})" if error.hint else ""
            ending = {"code": 126, "error": f"{error.message}{hint}"[:4000]}
        finally:
            self._end(stream, ending)

    def _end(self, stream: int, ending: dict[str, Any]) -> None:
        self._channel.drop_stream(stream)
        self._channel.send(frames.EXIT, 0, stream, encode(ending))

    # as whom

    async def _account(self, name: str) -> Account:
        """The account, sanctioned and served; once for all of its commands. What failed or ended is asked anew."""
        task = self._known.get(name)
        if task is None or task.done() and (task.cancelled() or task.exception() or self._wanting(name)):
            task = self._known[name] = asyncio.ensure_future(self._made(name))
            task.add_done_callback(self._forget_failed)
        return await asyncio.shield(task)

    def _wanting(self, name: str) -> bool:
        return self._serving is not None and self._serving.wanting(name)

    def _forget_failed(self, task: asyncio.Task[Account]) -> None:
        if task.cancelled() or task.exception():
            self._known = {name: each for name, each in self._known.items() if each is not task}

    async def _made(self, name: str) -> Account:
        if self._serving is None:
            raise RequestError(f"account {name[:70]!r}: there is no wnodesd to this VM, and no other may sanction one")
        async with self._one:
            return await self._serving.serve(name)

    # its command

    async def _run(self, caller: int, wish: Wish, account: Account, gone: asyncio.Event) -> dict[str, Any]:
        """Run the command in the guest, with its caller's stdio, to its end or the caller's."""
        over: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        def heard(kind: int, sub: int, stream: int, payload: Any) -> None:
            if kind == frames.EXIT and not over.done():
                over.set_result(decode(payload))

        stream = self._channel.new_stream(heard)
        leaving = asyncio.ensure_future(gone.wait())
        ends: list[asyncio.Future[Any]] = [over, leaving, self._channel.lost]
        try:
            self._channel.send(frames.OPEN, 0, stream, encode(self._order(caller, wish, account)))
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not over.done():
                await self._hang_up(stream, over)
            return _checked(over.result()) if over.done() else {"code": 1}
        finally:
            leaving.cancel()
            self._channel.drop_stream(stream)

    async def _hang_up(self, stream: int, over: asyncio.Future[dict[str, Any]]) -> None:
        self._channel.send(frames.CONTROL, 0, stream, b'{"signal":15,"to":"group"}')
        ends: list[asyncio.Future[Any]] = [over, self._channel.lost]
        await asyncio.wait(ends, timeout=_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        self._channel.send(frames.CONTROL, 0, stream, b'{"close":true}')  # by SIGKILL soon, if need be

    def _order(self, caller: int, wish: Wish, account: Account) -> dict[str, Any]:
        assert self._serving  # who has sanctioned it
        hidden = [mount.target for mount in reversed(self._plan.mounts)]
        shown = [word for mount in self._serving.shown(account) for word in mount]
        groups = ",".join(map(str, dict.fromkeys([account.gid, *account.groups.values()])))
        ids = [str(account.uid), str(account.gid), groups]
        words = [str(len(hidden)), *hidden, str(len(account.mounts)), *shown, *ids]
        words += [self._folder(wish, account), *wish.argv]
        who = {"HOME": account.home, "USER": account.name, "LOGNAME": account.name, "SHELL": account.shell}
        return {
            "verb": "exec",
            "argv": ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, "wnodes-run-as", *words],
            "environ": {"PATH": _PATH, **wish.environ, **who},
            "cwd": "/",
            "umask": wish.umask,
            "stdio_of": caller,
        }

    def _folder(self, wish: Wish, account: Account) -> str:
        """Where the command begins: where its caller is, unless that is a folder which it is not to see."""
        path = posixpath.normpath(wish.cwd)
        seen, hidden = _deepest(path, account.mounts), _deepest(path, self._plan.mounts)
        return path if posixpath.isabs(path) and seen >= hidden else ""


def _deepest(path: str, mounts: Sequence[Mount]) -> int:
    """How long the target is of the mount in which a path lies, 0 for none."""
    return max((len(each.target) for each in mounts if inside(path, each.target)), default=0)


def _checked(ending: dict[str, Any]) -> dict[str, Any]:
    """A guest's word on how its command ended, as its own shim gets it back."""
    kept = {key: ending[key] for key in ("code", "signal") if isinstance(ending.get(key), int)}
    return {**kept, **({"error": str(ending["error"])[:4000]} if ending.get("error") else {})} or {"code": 1}
