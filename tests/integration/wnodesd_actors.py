"""The other side of wnodesd's socket, for its tests: a batch system's step, launchers, keepers.

A script of its own (stdlib only), because it runs as users who cannot read our environment:

``python3 -I wnodesd_actors.py step fakejob=ID:long SOCKET`` is the root-owned step daemon. It
reads one JSON command a line and forks launchers; they and their keepers report on its stdout.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress


def say(**what):
    os.write(1, json.dumps({"pid": os.getpid(), **what}).encode() + b"\n")


class Line:
    """A connection that speaks JSON lines."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.file = self.sock.makefile("rb")

    def ask(self, **message):
        self.sock.sendall(json.dumps(message).encode() + b"\n")
        return self.read()

    def read(self):
        try:
            line = self.file.readline()
        except ConnectionError:
            line = b""
        return json.loads(line) if line else None


def launcher(path, how):
    if how.startswith("{"):  # one question and no more
        say(role="asker", answer=Line(path).ask(lrms="fake", **json.loads(how)))
        os._exit(0)
    request, how = how.partition(":")[::2] if ":" in how else (None, how)
    try:
        line = Line(path)
        reply = line.ask(op="launch", lrms="fake", **({} if request is None else {"request": request}))
        progress = []
        while reply and "progress" in reply:
            progress.append(reply["progress"])
            reply = line.read()
    except OSError as error:
        reply, progress = {"ok": False, "error": {"message": str(error)}}, []
    say(role="launcher", reply=reply, progress=progress)
    if not reply or reply.get("role") != "start" or how == "die":
        os._exit(0)
    if how != "stay":
        keeper_pid = os.fork()
        if keeper_pid == 0:
            keeper(path, reply, how)
    signal.pause()


def keeper(path, grant, how):
    os.setsid()
    line = Line(path)
    reply = line.ask(op="hold", lease=grant["lease"], token=grant["token"])
    if not reply or not reply.get("ok"):
        say(role="keeper", hold=reply)
        os._exit(1)
    child = subprocess.Popen(["sleep", "300"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    with open(f"/proc/{child.pid}/stat") as stat:
        started = int(stat.read().rpartition(")")[2].split()[19])
    write(grant, "made", child.pid, started)
    say(role="keeper", hold=reply, child=child.pid)
    if how == "become":
        threading.Thread(target=becoming, args=(path, grant), daemon=True).start()
    if how == "fail":
        error = {"kind": "BootTimeout", "message": "the guest never answered", "hint": ""}
        say(role="keeper", verdict=line.ask(event="state", state="failed", error=error))
        child.kill()
        os._exit(1)
    if how == "flap":
        flap = "".join(json.dumps({"event": "state", "state": s}) + "\n" for s in ("paused", "running"))
        line.sock.sendall(flap.encode() * 20)
        say(role="keeper", flapped=True)
    steps = [["boot", 0.5, 1.5], ["first instruction", 2.0, 0.25], ["x" * 90, 2.0, 2.0], ["admit", 0, 1], ["y", 1e99, 1]]
    start = {"kind": "cold", "way": "\x1b[31m", "template": 7, "fallback": "BootTimeout"}
    state = {"event": "state", "state": "running", "trace": steps, "start": start, "origin": time.monotonic()}
    with suppress(BrokenPipeError):  # the daemon was killed meanwhile, which read() finds next
        line.sock.sendall(json.dumps(state).encode() + b"\n")
    while True:
        message = line.read()
        if message is None:
            line = again(path, grant)
        elif message.get("op") == "end" and how != "stubborn":
            child.kill()
            child.wait()
            write(grant, "gone", child.pid, started)
            say(role="keeper", ended=message["reason"])
            os._exit(0)


def becoming(path, grant):
    """Ask for accounts as a test wants it: ``{"message", "hand", "count", "again"}`` a connection of ``ask.sock``."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{grant['folder']}/ask.sock")
    listener.listen(64)
    kept = []  # the guest's ends: a gateway ends with them
    while True:
        test, _ = listener.accept()
        threading.Thread(target=become, args=(path, grant, test, kept)).start()


def become(path, grant, test, kept):
    wanted = json.loads(test.makefile("rb").readline())
    line = Line(path)
    message = {"op": "become", "lease": grant["lease"], "token": grant["token"], **wanted["message"]}
    heard = [line.ask(**message)]
    count = len(heard[0].get("account", {}).get("mounts", ())) + wanted.get("more", 0)
    if heard[0]["ok"] and wanted["hand"] != "nothing":
        ends = [handed(wanted["hand"]) for _ in range(count)]
        kept.extend(ends)
        fds = [each[0].fileno() for each in ends]
        socket.send_fds(line.sock, [b"{}\n"], fds) if fds else line.sock.sendall(b"{}\n")
        heard.append(line.read())
    test.sendall(json.dumps(heard).encode() + b"\n")


def handed(what):
    """(what the daemon gets, what we keep)."""
    if what == "file":
        return open("/dev/zero"), None
    if what == "unconnected":
        return socket.socket(socket.AF_UNIX), None
    if what == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        return socket.create_connection(listener.getsockname()), listener
    mine, theirs = socket.socketpair()
    return theirs, mine


def write(grant, op, pid, started):
    line = {"op": op, "kind": "process", "name": "gateway", "data": {"pid": pid, "started": started}}
    with open(f"{grant['folder']}/journal", "a") as journal:
        journal.write("\n" + json.dumps(line))


def again(path, grant):
    while True:
        try:
            line = Line(path)
            reply = line.ask(op="hold", lease=grant["lease"], token=grant["token"])
        except OSError:
            reply = None
        if reply:
            say(role="keeper", rehold=reply)
            if not reply["ok"]:
                os._exit(1)
            return line
        time.sleep(0.05)  # nothing announces that a daemon listens again


def step(path):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        command = json.loads(line)
        for _ in range(command.get("count", 1)):
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setgroups([])
                os.setgid(command["uid"])
                os.setuid(command["uid"])
                launcher(path, command["how"])


if __name__ == "__main__":
    if sys.argv[1] == "step":
        step(sys.argv[3])
    else:
        signal.pause()
