"""A load: python3 -c THIS PART FOLDER NAME COLD MIB FILES; prints rates and the CPU seconds they took as JSON.

PART is ``large`` (one file written, then read with cold caches), ``small`` (4 KiB at random places,
then many files), ``direct`` (as large, past the page cache, so that no CPU copies: what the disk itself can) or
``git`` (the status of the tree at FOLDER/tree). NAME is for this run alone. COLD is how
caches are emptied: ``machine`` drops all of this kernel's (a guest's), ``file`` those of the one file: a host has
other users. No piece of ``small`` takes longer than PATIENCE_S: what was done by then makes the rate.
"""

import json
import mmap
import os
import random
import subprocess
import sys
import time

PART, FOLDER, NAME, COLD, MIB, FILES = *sys.argv[1:5], int(sys.argv[5]), int(sys.argv[6])
BLOCK = os.urandom(1 << 20)
TOP = FOLDER + "/" + NAME
BIG = TOP + "-big"
PLACES = random.Random(7)
RANDOM, PATIENCE_S, FOLDERS = 200, 10.0, 10
# minimal: inode numbers and full times are not part of what a network file system keeps.
GIT = ["git", "-c", "safe.directory=*", "-c", "core.checkStat=minimal", "-c", "core.trustctime=false"]
rates = {}


def cold():
    """Write back and forget what is cached."""
    if COLD == "machine":
        os.sync()
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")
    elif os.path.exists(BIG):
        fd = os.open(BIG, os.O_RDWR)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def busy():
    """Seconds that this machine's CPUs were busy; of a host that others use, those of this process."""
    if COLD == "file":
        return time.process_time()
    with open("/proc/stat") as file:
        words = [int(word) for word in file.readline().split()[1:9]]
    return (sum(words) - words[3] - words[4]) / os.sysconf("SC_CLK_TCK")


def timed(name, work):
    """What it did (an amount) a second, and the CPU seconds it took."""
    began, before = time.monotonic(), busy()
    amount = work()
    rates[name] = amount / (time.monotonic() - began)
    rates[name + " cpu"] = busy() - before
    return amount


def each(items, work):
    """Do it to one after the other while there is patience: how many."""
    end = time.monotonic() + PATIENCE_S
    done = 0
    for item in items:
        work(item)
        done += 1
        if time.monotonic() > end:
            break
    return done


def write():
    fd = os.open(BIG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for _ in range(MIB):
        os.write(fd, BLOCK)
    os.fsync(fd)
    os.close(fd)
    return MIB


def read():
    fd = os.open(BIG, os.O_RDONLY)
    while os.read(fd, 1 << 20):
        pass
    os.close(fd)
    return MIB


def place():
    return PLACES.randrange(MIB * 256) * 4096


def random_read():
    fd = os.open(BIG, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    done = each(range(RANDOM), lambda _: os.pread(fd, 4096, place()))
    os.close(fd)
    return done


def random_write():
    fd = os.open(BIG, os.O_WRONLY)
    done = each(range(RANDOM), lambda _: os.pwrite(fd, BLOCK[:4096], place()))
    os.fsync(fd)
    os.close(fd)
    return done


def names(count):
    return [f"{TOP}/d{n % FOLDERS}/f{n}" for n in range(count)]


def create():
    for n in range(FOLDERS):
        os.makedirs(f"{TOP}/d{n}")
    return each(names(FILES), lambda name: os.close(os.open(name, os.O_WRONLY | os.O_CREAT, 0o644)))


def walk():
    return each((f"{top}/{name}" for top, _, files in os.walk(TOP) for name in files), os.lstat)


def small():
    cold()
    timed("random read", random_read)
    timed("random write", random_write)
    os.unlink(BIG)
    made = int(timed("create", create))
    rates["files"] = made
    cold()
    timed("stat", lambda: each(names(made), os.stat))
    cold()
    timed("walk", walk)
    timed("unlink", lambda: each(names(made), os.unlink))


def direct():
    """O_DIRECT wants aligned memory: a map has it."""
    block = mmap.mmap(-1, 1 << 20)
    block.write(BLOCK)
    fd = os.open(BIG, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)

    def all_of(call):
        for n in range(MIB):
            call(n << 20)
        return MIB

    timed("direct write", lambda: all_of(lambda place: os.pwrite(fd, block, place)))
    timed("direct read", lambda: all_of(lambda place: os.preadv(fd, [block], place)))
    os.close(fd)
    os.unlink(BIG)


def git():
    argv = [*GIT, "-C", f"{FOLDER}/tree", "status", "--porcelain"]
    cold()
    timed("git status", lambda: int(not check(argv)) * FILES)


def check(argv):
    """What a program says; a tree that is not as it was committed would make other work. Ends the load."""
    said = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
    if said.returncode or said.stdout:
        sys.exit(f"git status: {said.stderr.strip()[-200:]} {said.stdout[:200]}: want nothing said")
    return said.stdout


if PART == "large":
    timed("write", write)
    cold()
    timed("read", read)
else:
    {"small": small, "direct": direct, "git": git}[PART]()
print(json.dumps(rates))
