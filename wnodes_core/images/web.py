"""Fetching over HTTP: goes on where it stopped, tries again, never waits for ever.

urllib brings redirects, TLS and the site's proxies; the body of a plain response is spliced by
the kernel from the socket to the file, which is what makes it as fast as curl.
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import json
import os
import random
import re
import select
import ssl
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import wnodes_core
from wnodes_core.api import errors
from wnodes_core.images.sources import need_room
from wnodes_core.tools import full_disk_is_host_error

STALL_S = 20.0  # no byte for so long: the connection is dead
TRIES = 4  # in a row without one new byte
BACKOFF_S = 0.25
_CHUNK = 1 << 20
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)\Z")
Progress = Callable[[int, int], None]


class _Again(Exception):
    """This try failed; another may do."""


class _StartOver(_Again):
    """What we have is no part of what there is; another try from the first byte may do."""


class _Refused(Exception):
    """No further try will do."""


@dataclass(frozen=True)
class _Seen:
    """What the bytes of a partial file came from, so that the next try may ask for the rest."""

    url: str = ""
    validator: str = ""
    total: int = 0

    @classmethod
    def of(cls, into: Path) -> _Seen:
        with suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(_note(into).read_bytes()))
        return cls()

    def keep(self, into: Path) -> None:
        _note(into).write_text(json.dumps(asdict(self)))


def _note(into: Path) -> Path:
    return into.with_name(f"{into.name}.seen")


def fetch(url: str, into: Path, deadline: float, progress: Progress) -> None:
    """Bring ``url`` into ``into``, going on after the bytes that are already there.

    Raises FetchError once the server refuses, TRIES tries in a row brought nothing or the
    deadline passed; StateDirFull.
    """
    fruitless = 0
    with full_disk_is_host_error(into.parent):
        while True:
            before = _size(into)
            try:
                _once(url, into, deadline, progress)
                _note(into).unlink(missing_ok=True)
                return
            except _Again as error:
                fruitless = 0 if _size(into) > before else fruitless + 1
                if isinstance(error, _StartOver):
                    progress(0, 0)  # before the cut: whoever reads along must know first
                    os.truncate(into, 0)
                pause = BACKOFF_S * 2**fruitless * random.uniform(0.5, 1)
                if fruitless >= TRIES or time.monotonic() + pause > deadline:
                    raise errors.FetchError(f"{url}: {error}") from error
            except _Refused as error:
                raise errors.FetchError(f"{url}: {error}") from error
            time.sleep(pause)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _opener() -> urllib.request.OpenerDirector:
    """Like urllib's own, but without ftp:// and file://, to which a server could redirect us."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _request(url: str, have: int, seen: _Seen) -> urllib.request.Request:
    headers = {"User-Agent": f"wnodes/{wnodes_core.__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if seen.url == url and seen.validator:
            headers["If-Range"] = seen.validator
    return urllib.request.Request(url, headers=headers)


@contextmanager
def _failures_are_again() -> Any:
    """Network failures of every kind become another try."""
    try:
        yield
    except HTTPError:
        raise
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise _Refused(f"certificate: {error.reason.verify_message}") from error
        raise _Again(str(error.reason)) from error
    except TimeoutError as error:
        raise _Again(f"no byte for {STALL_S:g} s") from error
    except (ConnectionError, ssl.SSLError) as error:
        raise _Again(error.strerror or str(error)) from error
    except http.client.HTTPException as error:
        raise _Again(f"broken answer: {type(error).__name__}") from error


def _open(url: str, have: int, seen: _Seen, deadline: float) -> Any:
    patience = max(0.1, min(STALL_S, deadline - time.monotonic()))
    try:
        with _failures_are_again():
            return _opener().open(_request(url, have, seen), timeout=patience)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:
            raise _StartOver("HTTP 416") from error
        if error.code in _AGAIN:
            raise _Again(f"HTTP {error.code} {error.reason}") from error
        raise _Refused(f"HTTP {error.code} {error.reason}") from error


def _once(url: str, into: Path, deadline: float, progress: Progress) -> None:
    have, seen = _size(into), _Seen.of(into)
    if have and have == seen.total:
        progress(have, have)
        return
    with _open(url, have, seen, deadline) as response:
        start, total = _where(response, have, seen)
        progress(start, total)  # before the cut, as above
        fd = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, start)
            os.lseek(fd, start, os.SEEK_SET)
            need_room(into, max(0, total - start))
            _Seen(url, _validator(response), total).keep(into)
            with _failures_are_again():
                _body(response, fd, start, total, deadline, progress)
        finally:
            os.close(fd)
    if total and _size(into) != total:
        raise _Again(f"the connection ended after {_size(into)} of {total} bytes")


def _validator(response: Any) -> str:
    etag = str(response.headers.get("ETag", ""))
    if etag and not etag.startswith("W/"):  # If-Range wants a strong one: RFC 9110, 13.1.5
        return etag
    return str(response.headers.get("Last-Modified", ""))


def _where(response: Any, have: int, seen: _Seen) -> tuple[int, int]:
    """(offset of the first byte that comes, size of the whole or 0)."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _Refused(f"the server insists on {response.headers['Content-Encoding']} encoding")
    if response.status != 206:
        return 0, response.length or 0
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if not match or match[1] is None or int(match[1]) != have:
        raise _StartOver(f"asked from byte {have}, got {response.headers.get('Content-Range')}")
    total = 0 if match[2] == "*" else int(match[2])
    if seen.total and total and total != seen.total:
        raise _StartOver(f"it has {total} bytes, the part before was of {seen.total}")
    return have, total


def _body(response: Any, fd: int, done: int, total: int, deadline: float, progress: Progress) -> None:
    spliced = response.length is not None and response.url.startswith("http:")
    # One read takes what urllib has buffered with the headers; after it the socket is ours.
    while block := response.read1(1 << 16 if spliced else _CHUNK):
        _write(fd, block)
        done += len(block)
        progress(done, total)
        _in_time(deadline)
        if spliced and done < total:
            _splice(response.fileno(), fd, done, total, deadline, progress)
            return


def _write(fd: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(fd, view) :]


def _in_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise _Again("not done in time")


def _splice(sock: int, fd: int, done: int, total: int, deadline: float, progress: Progress) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _CHUNK)
        while done < total:
            if not poller.poll(min(STALL_S, max(0.1, deadline - time.monotonic())) * 1000):
                _in_time(deadline)
                raise TimeoutError
            count = os.splice(sock, writer, min(_CHUNK, total - done), flags=os.SPLICE_F_MOVE)
            if count == 0:
                return  # the caller sees that bytes are missing
            _drain(reader, fd, count)
            done += count
            progress(done, total)
            _in_time(deadline)
    finally:
        os.close(reader)
        os.close(writer)


def _drain(reader: int, fd: int, count: int) -> None:
    while count:
        try:
            count -= os.splice(reader, fd, count, flags=os.SPLICE_F_MOVE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that cannot be spliced into
                raise
            block = os.read(reader, count)
            _write(fd, block)
            count -= len(block)
