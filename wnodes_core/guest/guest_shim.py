#!/usr/bin/python3 -IS
"""Run this command on the host: the guest's stand-in for srun, squeue and the like.

Hands argv, folder, environment and stdio to the agent, forwards signals by dying of them,
exits as the host's command did. Stands alone: no module beyond python3-minimal's builtins.
"""
# ruff: noqa: UP031 - guest code, Python 3.6

import array
import fcntl
import os
import signal
import socket
import struct
import sys

PASSED = ("TERM", "LANG", "LC_ALL", "TZ")  # what a second account is told of our environment
DOOR = os.environ.get("WNODES_DOOR", "/run/wnodes/host.sock")
ESCAPES = {code: "\\u%04x" % code for code in range(32)}
ESCAPES.update({34: '\\"', 92: "\\\\"})


def quoted(text):
    return '"' + text.translate(ESCAPES) + '"'


def terminal():
    """Ours, if we may use it: '[rows,columns]'; else 'null'."""
    try:
        if not (os.isatty(0) and os.isatty(1) and os.isatty(2) and os.tcgetpgrp(0) == os.getpgrp()):
            return "null"
        return "[%d,%d]" % struct.unpack("HHHH", fcntl.ioctl(0, 0x5413, bytes(8)))[:2]  # TIOCGWINSZ
    except OSError:
        return "null"


def make_raw():
    """cfmakeraw(3) without the termios module; returns what restores it."""
    saved = fcntl.ioctl(0, 0x5401, bytes(64))  # TCGETS; linux/asm-generic/termbits.h
    iflag, oflag, cflag, lflag = struct.unpack_from("IIII", saved)
    flags = (iflag & ~0o2753, oflag & ~1, cflag & ~0o460 | 0o60, lflag & ~0o100113)
    characters = bytearray(saved[16:])
    characters[1 + 5 : 1 + 7] = b"\x00\x01"  # after c_line: VTIME 0, VMIN 1
    fcntl.ioctl(0, 0x5402, struct.pack("IIII", *flags) + bytes(characters))  # TCSETS
    return saved


def request(tty):
    argv = [os.path.basename(sys.argv[0])] + sys.argv[1:]
    verb, shown = ("become", PASSED) if argv[0] == "wnodes-run-as" else ("hostcmd", os.environ)
    pairs = [(name, os.environ[name]) for name in shown if name in os.environ]
    environ = ",".join(quoted(name) + ":" + quoted(value) for name, value in pairs)
    text = '{"verb":"%s","argv":[%s],"cwd":%s,"umask":%d,"exec":%s,"tty":%s,"environ":{%s}}\n' % (
        verb,
        ",".join(map(quoted, argv)),
        quoted(os.getcwd()),
        current_umask(),
        quoted(os.environ.get("WNODES_EXEC", "")),
        tty,
        environ,
    )
    return text.encode("utf-8", "backslashreplace")


def current_umask():
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def answer(door):
    """The line that says how the command ended; empty if it never came."""
    reply = b""
    while not reply.endswith(b"\n"):
        try:
            chunk = door.recv(65536)
        except OSError:  # a door that closes upon what it has not read
            chunk = b""
        if not chunk:
            return b""
        reply += chunk
    return reply


def main():
    name = os.path.basename(sys.argv[0])
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        door.connect(DOOR)
    except OSError as error:
        sys.stderr.write("%s: %s: %s\n" % (name, DOOR, error.strerror))
        return 127
    tty = terminal()
    data = request(tty)
    fds = array.array("i", [0, 1, 2])
    try:
        sent = door.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)], socket.MSG_NOSIGNAL)
        door.sendall(data[sent:], socket.MSG_NOSIGNAL)
    except OSError:
        pass  # whoever is not let in learns it below
    saved = make_raw() if tty != "null" else None
    reply = answer(door)
    if saved is not None:
        fcntl.ioctl(0, 0x5402, saved)
    if not reply:
        sys.stderr.write("%s: the host has gone, or serves only the user of the job\n" % name)
        return 1
    ending = eval(reply.decode("utf-8"), {"true": True, "false": False, "null": None, "__builtins__": {}})
    if ending.get("error"):
        sys.stderr.write("%s: %s\n" % (name, ending["error"]))
    if ending.get("signal"):
        if ending["signal"] not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(ending["signal"], signal.SIG_DFL)
        os.kill(os.getpid(), ending["signal"])
    return ending.get("code", 1)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    os._exit(main())
