"""Users who try to keep wnodesd from serving others, against a real one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from wnodesd_harness import UID, node_fixture, python_fixture, until  # noqa: E402, F401 - fixtures

FLOOD = """
import os, socket, sys, threading
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
def talk():
    line = sys.argv[3].encode() + b"\\n"
    while True:
        try:
            sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1]); file = sock.makefile("rb")
            for _ in range(int(sys.argv[5])):
                sock.sendall(line); file.readline()
            sock.close()
        except OSError:
            pass
for _ in range(int(sys.argv[4])):
    threading.Thread(target=talk, daemon=True).start()
print("flooding", flush=True)
threading.Event().wait()
"""


def flood(node, line: str, *, clients: int, each: int) -> subprocess.Popen[bytes]:
    argv = ["/usr/bin/python3", "-I", "-c", FLOOD, node.socket, str(UID + 1), line, str(clients), str(each)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def open_files(node) -> int:
    return len(os.listdir(f"/proc/{node.daemon.pid}/fd"))


def test_scrapers_that_never_ask_take_no_open_files_from_wnodesd(node):
    node.start()
    before = open_files(node)
    scrapers = []
    began = time.monotonic()
    for _ in range(300):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(node.run / "metrics.sock"))
        scrapers.append(sock)
    until(lambda: open_files(node) <= before + 40, "the surplus is turned away")
    assert time.monotonic() - began < 4  # before their time to ask is over
    node.prepare()
    for sock in scrapers:
        sock.close()


def test_a_node_full_of_jobs_that_wait_for_an_image_keeps_no_other_job_from_its_end(node):
    node.start()
    node.prepare("1")
    for number in range(40):
        node.prepare(str(100 + number), image="slow")
    began = time.monotonic()
    assert node.finish("1") == {"ok": True, "pending": False}
    assert time.monotonic() - began < 3


def test_a_users_flood_of_questions_delays_no_job(node):
    node.start()
    floods = [flood(node, '{"op": "leases", "ended": true}', clients=60, each=n) for n in (1, 1000)]
    try:
        times = []
        for number in range(5):
            began = time.monotonic()
            node.prepare(str(number))
            node.finish(str(number))
            times.append(time.monotonic() - began)
    finally:
        for each in floods:
            each.kill()
            each.wait()
            each.stdout.close()
    print(f"prepare and finish under a flood: {max(times):.2f} s at most")
    assert max(times) < 4  # a hook has 8


def test_a_keeper_that_flaps_between_states_is_noted_once(node):
    node.start()
    lease = node.prepare()
    step = node.step()
    step.launch(how="flap")
    step.expect("flapped")
    until(lambda: ["boot", 0.5, 1.5] in node.leases()[0]["trace"], "the last word is heard")
    lines = (node.state / "journal" / f"{lease}.jsonl").read_text().count('"state": "running"')
    assert lines <= 3
