"""Guest program: mount one folder with sshfs over a virtio-serial port. Python >= 3.6, root.

usage: python3 -I -c SOURCE PORT TARGET BINARY PROGRAM [ARGUMENT ...]

BINARY is the sshfs file itself, which PROGRAM (a loader, perhaps) runs.

``sshfs -o passive`` never goes to the background, so this starts it apart and returns when the
kernel shows the mount. Exit code 0: mounted. Else the reason is on stderr.
"""
import os
import shutil
import subprocess
import sys
import time

PORTS = "/sys/class/virtio-ports"
DEADLINE_S = 60.0


def find_port(name):
    """Path of the port's device, or ''."""
    for port in os.listdir(PORTS):
        try:
            with open(PORTS + "/" + port + "/name") as file:
                if file.read().strip() == name:
                    return "/dev/" + port
        except OSError:
            pass
    return ""


def mounted(target):
    """Whether a fuse file system is mounted at ``target`` itself."""
    octal = "".join("\\%03o" % ord(c) if c in " \t\n\\" else c for c in target)
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        lines = [line.split() for line in file]
    return any(words[4] == octal and "fuse.sshfs" in words for words in lines)


def understands(program, option):
    """Whether the sshfs binary knows an option: asking it would cost an emulated guest 0.2 s."""
    try:
        with open(shutil.which(program) or program, "rb") as file:
            return option in file.read()
    except OSError:
        return False


def complain(child, errors):
    """Why there is no mount: what sshfs said, or that it said nothing in time."""
    if child.poll() is None:
        child.kill()
    os.lseek(errors, 0, os.SEEK_SET)
    said = os.read(errors, 2000).decode(errors="replace").strip()
    return "sshfs: %s" % (said or "no answer from the host within %g s" % DEADLINE_S)


def main(name, target, argv, binary):
    """Returns '' or what went wrong."""
    os.makedirs(target, exist_ok=True)
    if not os.path.exists("/dev/fuse"):
        subprocess.call(["modprobe", "fuse"])
    path = find_port(name)
    if not path:
        return "no virtio-serial port %s" % name
    if understands(binary, b"no_contain_symlinks"):
        argv = argv[:-1] + [argv[-1] + ",no_contain_symlinks"]
    port = os.open(path, os.O_RDWR)
    errors = os.open("/run", os.O_RDWR | os.O_TMPFILE, 0o600)
    child = subprocess.Popen(argv, stdin=port, stdout=port, stderr=errors, start_new_session=True, cwd="/")
    os.close(port)
    end = time.monotonic() + DEADLINE_S
    while not mounted(target):
        if child.poll() is not None or time.monotonic() > end:
            return complain(child, errors)
        time.sleep(0.005)
    os.statvfs(target)  # the first answer through the new mount: from here on it works
    child.returncode = 0  # it lives on as the mount; nobody waits for it here
    return ""


if __name__ == "__main__":
    problem = main(sys.argv[1], sys.argv[2], sys.argv[4:], sys.argv[3])
    if problem:
        sys.stderr.write(problem + "\n")
    sys.exit(1 if problem else 0)
