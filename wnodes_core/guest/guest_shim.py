#!/usr/bin/python3 -IS
"""Run this command on the host: the guest's stand-in for srun, squeue and the like.

Hands argv, folder, environment and stdio to the agent, forwards signals by dying of them,
exits as the host's command did. Stands alone: no module beyond python3-minimal's builtins.
"""
# ruff: noqa: UP031 - guest code, Python 3.6

import array
import os
import signal
import socket
import sys

DOOR = os.environ.get("WNODES_DOOR", "/run/wnodes/host.sock")
ESCAPES = {code: "\\u%04x" % code for code in range(32)}
ESCAPES.update({34: '\\"', 92: "\\\\"})


def quoted(text):
    return '"' + text.translate(ESCAPES) + '"'


def request():
    environ = ",".join(quoted(name) + ":" + quoted(value) for name, value in os.environ.items())
    argv = [os.path.basename(sys.argv[0])] + sys.argv[1:]
    text = '{"verb":"hostcmd","argv":[%s],"cwd":%s,"umask":%d,"exec":%s,"environ":{%s}}\n' % (
        ",".join(map(quoted, argv)),
        quoted(os.getcwd()),
        current_umask(),
        quoted(os.environ.get("WNODES_EXEC", "")),
        environ,
    )
    return text.encode("utf-8", "backslashreplace")


def current_umask():
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def main():
    name = os.path.basename(sys.argv[0])
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        door.connect(DOOR)
    except OSError as error:
        sys.stderr.write("%s: %s: %s\n" % (name, DOOR, error.strerror))
        return 127
    data = request()
    fds = array.array("i", [0, 1, 2])
    sent = door.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    if sent < len(data):
        door.sendall(data[sent:])
    reply = b""
    while not reply.endswith(b"\n"):
        chunk = door.recv(65536)
        if not chunk:
            sys.stderr.write("%s: the host has gone\n" % name)
            return 1
        reply += chunk
    ending = eval(reply.decode("utf-8"), {"true": True, "false": False, "null": None, "__builtins__": {}})
    if ending.get("error"):
        sys.stderr.write("%s: %s\n" % (name, ending["error"]))
    if ending.get("signal"):
        signal.signal(ending["signal"], signal.SIG_DFL)
        os.kill(os.getpid(), ending["signal"])
    return ending.get("code", 1)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    os._exit(main())
