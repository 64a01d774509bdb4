"""wnodesd, the process: its sockets, its signals, its start and its end.

``wnodesd --config PATH [--log-format json|text]``. It stays in the foreground (systemd's
Type=notify). SIGTERM ends it and leaves running leases alone; SIGHUP reads the settings again.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import resource
import signal
import socket
import sys
from collections import Counter
from contextlib import suppress
from importlib import resources
from typing import Any, NoReturn

from wnodes_core.agent import leases, logs, protocol
from wnodes_core.agent.capacity import Capacity
from wnodes_core.agent.daemon import Daemon, Parts, log
from wnodes_core.agent.operations import Operations
from wnodes_core.agent.protocol import MAX_LINE, Connection
from wnodes_core.agent.sweeper import Advertiser, Sweeper
from wnodes_core.errors import BadRequest, HostBusy, WnodesError, from_dict

MAX_CLIENTS = 4096
BACKLOG = 1024
DROP_INS = ("network", "lvm", "nfs", "files")
MAX_CLIENTS_PER_UID = 1024  # one launcher a task waits here while its VM boots


class Server:
    """One daemon on its sockets."""

    def __init__(self, parts: Parts) -> None:
        self.daemon = Daemon(parts)
        self.operations = Operations(self.daemon)
        self._clients: Counter[int] = Counter()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM.

        Raises OSError, SettingsError if the sockets cannot be had.
        """
        settings = self.daemon.settings
        leases.folders(settings.state_dir, settings.run_dir)
        self._alone = _alone(f"{settings.run_dir}/wnodesd.lock")
        self._signals()
        self.daemon.accel = asyncio.ensure_future(self._accel())
        self.daemon.accel.add_done_callback(_seen)
        self.daemon.load()
        for lease in list(self.daemon.leases.values()):
            self.daemon.readopt(lease, self.operations.launching.resume)
        sock = _listen(settings.daemon.socket)
        server = await asyncio.start_unix_server(self._client, sock=sock, limit=MAX_LINE, backlog=BACKLOG)
        metrics = await self.daemon.metrics.serve(settings.daemon.metrics)
        self.daemon.background(Sweeper(self.daemon, self.operations.warm).run(), "sweeper")
        self.daemon.background(self.operations.pool.run(), "pool")
        self.daemon.background(Advertiser(self.daemon).run(), "advertiser")
        self.daemon.background(Capacity(self.daemon).run(), "capacity")
        log.info("ready at %s", settings.daemon.socket, extra={"event": "ready"})
        notify("READY=1")
        await self._stop.wait()
        notify("STOPPING=1")
        self.daemon.stopping = True
        server.close()
        metrics.close()
        log.info("stopped, %d leases left running", len(self.daemon.leases), extra={"event": "stopped"})

    def _signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        """Read the settings again; folders and sockets stay what they were. Bad settings change nothing."""
        if self.daemon.parts.reload is None:
            return
        try:
            new = self.daemon.parts.reload()
        except WnodesError as error:
            log.error("settings kept: %s", error, extra={"event": "reload"})
            return
        old = self.daemon.settings
        if (new.state_dir, new.run_dir, new.daemon.socket) != (old.state_dir, old.run_dir, old.daemon.socket):
            log.error("settings kept: folders and socket change only by a restart", extra={"event": "reload"})
            return
        self.daemon.settings = new
        self.daemon.advertise_wanted.set()
        log.info("settings read again", extra={"event": "reload"})

    async def _accel(self) -> str:
        """The accelerator that works here, told once by the backend in a process of its own."""
        answer = await self.daemon.slow(self.daemon.parts.probe)
        if "error" in answer:
            raise from_dict(answer["error"])
        log.info("accelerator %s %s", answer["accel"], answer.get("notice", ""), extra={"event": "probe"})
        return str(answer["accel"])

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        uid = connection.peer.uid
        self._clients[uid] += 1
        try:
            if self._too_many(uid):
                self.daemon.metrics.refused.labels("too many").inc()
                await connection.send(protocol.refusal(HostBusy(f"wnodesd serves too many clients of uid {uid}")))
            else:
                await self._serve(connection)
        finally:
            self._clients[uid] -= 1
            connection.close()

    def _too_many(self, uid: int) -> bool:
        if uid == 0:
            return False  # hooks must get through whatever users do
        return self._clients.total() > MAX_CLIENTS or self._clients[uid] > MAX_CLIENTS_PER_UID

    async def _serve(self, connection: Connection) -> None:
        try:
            while (message := await connection.read()) is not None:
                reply = await self._reply(connection, message)
                if reply is None or not await connection.send(reply):
                    return
        except BadRequest as error:  # no line of ours: what follows cannot be trusted to begin a line
            self.daemon.metrics.refused.labels("garbage").inc()
            await connection.send(protocol.refusal(error))

    async def _reply(self, connection: Connection, message: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return await self.operations.answer(connection, message)
        except WnodesError as error:
            return protocol.refusal(error)
        except (asyncio.CancelledError, ConnectionError):
            return None
        except Exception as error:  # noqa: BLE001 - a net: one client's bug ends no other's lease
            log.exception("bug in %s", str(message.get("op"))[:40], extra={"event": "bug", "uid": connection.peer.uid})
            return protocol.refusal(error)


def _seen(task: asyncio.Future[str]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("probe: %s", error, extra={"event": "probe"})


def _alone(path: str) -> int:
    """Hold the node's lock: two daemons would undo each other's leases. Raises HostBusy."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise HostBusy(f"{path}: another wnodesd runs here", hint="systemctl status wnodesd") from None
    return fd


def _listen(path: str) -> socket.socket:
    """A listening socket that every user of the node may connect to."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    os.chmod(path, 0o666)
    return sock


def notify(text: str) -> None:
    """Tell systemd (sd_notify(3)), where it wants to be told."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if where:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
            sock.sendto(text.encode(), "\0" + where[1:] if where.startswith("@") else where)


def serve(parts: Parts) -> NoReturn:
    """Run until told to stop; never returns."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * MAX_CLIENTS  # socket and pidfd a client, and as much again for leases
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted if hard == -1 else min(hard, wanted)), hard))
    os.umask(0o022)

    async def main() -> None:
        await Server(parts).run()
        # Threads may be in a fetch of half an hour; the journal is made to be left at any line.
        sys.stderr.flush()
        os._exit(0)

    asyncio.run(main())
    os._exit(1)


def unit() -> str:
    """The systemd unit, with the path of the ``wnodesd`` that runs here."""
    text = resources.files(__package__).joinpath("wnodesd.service").read_text()
    here = os.path.abspath(os.path.join(os.path.dirname(sys.executable), "wnodesd"))
    return text.replace("/opt/wnodes/bin/wnodesd", here)


def drop_in(name: str) -> str:
    """What systemd adds to the unit for one use, of ``DROP_INS``."""
    return resources.files(__package__).joinpath(f"{name}.conf").read_text()


def main() -> int:
    """Entry point of ``wnodesd``."""
    from wnodes_core.agent.parts import default_parts

    parser = argparse.ArgumentParser(prog="wnodesd", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", metavar="PATH", help="settings file (default: /etc/wnodes/wnodes.yaml and conf.d)")
    parser.add_argument("--foreground", action="store_true", help="accepted for habit: it never leaves it")
    parser.add_argument("--log-format", choices=("json", "text"), default="json")
    parser.add_argument("--print-unit", action="store_true", help="print a systemd unit for this installation, and end")
    parser.add_argument("--print-drop-in", choices=DROP_INS, help="print what the unit needs for this use, and end")
    arguments = parser.parse_args()
    if arguments.print_unit or arguments.print_drop_in:
        print(drop_in(arguments.print_drop_in) if arguments.print_drop_in else unit(), end="")
        return 0
    try:
        parts = default_parts(arguments.config)
        logs.set_up(arguments.log_format, parts.settings.daemon.log_level)
        serve(parts)
    except (WnodesError, OSError) as error:
        print(f"wnodesd: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
