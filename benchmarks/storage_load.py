"""Runs in the guest: python3 -c THIS PART FOLDER MIB FILES; prints rates and the guest's busy seconds as JSON.

PART is ``large`` (one file written, then read with cold caches) or ``small`` (4 KiB at random places,
many files, and the walk with an lstat of each that ``git status`` is made of).
"""

import json
import os
import random
import sys
import time

PART, FOLDER, MIB, FILES = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
BLOCK = os.urandom(1 << 20)
BIG = FOLDER + "/big"
PLACES = random.Random(7)
RANDOM = 200
rates = {}


def cold():
    """Write back and forget what this kernel has cached."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def busy():
    """Seconds that this machine's CPUs were busy."""
    with open("/proc/stat") as file:
        words = [int(word) for word in file.readline().split()[1:9]]
    return (sum(words) - words[3] - words[4]) / os.sysconf("SC_CLK_TCK")


def timed(name, amount, work):
    """Amount a second, and the CPU seconds it took."""
    began, before = time.monotonic(), busy()
    work()
    rates[name] = amount / (time.monotonic() - began)
    rates[name + " cpu"] = busy() - before


def write():
    fd = os.open(BIG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for _ in range(MIB):
        os.write(fd, BLOCK)
    os.fsync(fd)
    os.close(fd)


def read():
    fd = os.open(BIG, os.O_RDONLY)
    while os.read(fd, 1 << 20):
        pass
    os.close(fd)


def random_read():
    fd = os.open(BIG, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for _ in range(RANDOM):
        os.pread(fd, 4096, PLACES.randrange(MIB * 256) * 4096)
    os.close(fd)


def random_write():
    fd = os.open(BIG, os.O_WRONLY)
    for _ in range(RANDOM):
        os.pwrite(fd, BLOCK[:4096], PLACES.randrange(MIB * 256) * 4096)
    os.fsync(fd)
    os.close(fd)


def names():
    return [f"{FOLDER}/d{n % 10}/f{n}" for n in range(FILES)]


def create():
    for n in range(10):
        os.mkdir(f"{FOLDER}/d{n}")
    for name in names():
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT))


def walk():
    for top, _, files in os.walk(FOLDER):
        for name in files:
            os.lstat(top + "/" + name)


def unlink():
    for name in names():
        os.unlink(name)
    for n in range(10):
        os.rmdir(f"{FOLDER}/d{n}")


if PART == "large":
    timed("write", MIB, write)
    cold()
    timed("read", MIB, read)
else:
    cold()
    timed("random read", RANDOM, random_read)
    timed("random write", RANDOM, random_write)
    timed("create", FILES, create)
    cold()
    timed("stat", FILES, lambda: [os.stat(name) for name in names()])
    cold()
    timed("walk", FILES, walk)
    timed("unlink", FILES, unlink)
    os.unlink(BIG)
print(json.dumps(rates))
