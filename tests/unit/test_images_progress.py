"""The progress bar, on a terminal and in a log."""

from __future__ import annotations

import io

from wnodes_core.images.progress import Bar


class Stream(io.StringIO):
    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(tty: bool, steps: list[tuple[float, int, int]]) -> str:
    stream, clock = Stream(tty), Clock()
    bar = Bar("el9:latest", stream=stream, clock=clock)
    for clock.now, done, total in steps:
        bar(done, total)
    bar.close()
    return stream.getvalue()


def test_a_quick_fetch_draws_nothing() -> None:
    assert run(True, [(0, 0, 100), (0.9, 100, 100)]) == ""


def test_a_terminal_gets_one_line_that_is_wiped() -> None:
    text = run(True, [(0, 0, 100_000_000), (2, 50_000_000, 100_000_000), (2.05, 51_000_000, 100_000_000)])
    line = "el9:latest [############............]  50%  50.0 MB of 100.0 MB  25.0 MB/s  0:02 left"
    assert text == f"\r{line}\r{' ' * len(line)}\r"


def test_a_log_gets_a_line_now_and_then() -> None:
    text = run(False, [(t, t * 1_000_000, 20_000_000) for t in range(13)])
    assert text.splitlines() == [
        "el9:latest   5%  1.0 MB of 20.0 MB  1.0 MB/s  0:19 left",
        "el9:latest  30%  6.0 MB of 20.0 MB  1.0 MB/s  0:14 left",
        "el9:latest  55%  11.0 MB of 20.0 MB  1.0 MB/s  0:09 left",
    ]


def test_bytes_of_an_earlier_try_do_not_count_as_speed() -> None:
    assert "1.0 MB/s" in run(False, [(0, 90_000_000, 100_000_000), (2, 92_000_000, 100_000_000)])


def test_an_unknown_size_has_no_share() -> None:
    assert run(False, [(0, 0, 0), (2, 3_000_000, 0)]) == "el9:latest  3.0 MB  1.5 MB/s\n"
