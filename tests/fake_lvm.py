#!/usr/bin/python3 -IS
"""LVM's programs as far as we call them, on files behind loop devices: for machines without a device mapper.

Each program is a link to this file in one folder with ``state.json``; what they print follows lvs(8), lvcreate(8) and lvremove(8), reports in JSON (lvmreport(7)). An option that is not ours is an error. Blocks that a
plain volume gets are what the last owner left there: the words STALE. ``faults`` in the state name a program:
``{"lvcreate": "WORDS"}`` makes it fail with them, ``hang`` and ``garbage`` do what they say.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(sys.argv[0]).parent
MIB = 1 << 20


def fail(text, code=5):
    print(text, file=sys.stderr)
    sys.exit(code)


def options(argv, valued, bare):
    """Options with their values (lists), and the rest."""
    found, rest, words = {}, [], list(argv)
    while words:
        word = words.pop(0)
        if word in valued:
            found.setdefault(word, []).append(words.pop(0))
        elif word in bare:
            found[word] = [""]
        elif word.startswith("-"):
            fail(f"{sys.argv[0]}: unrecognized option '{word}'", 3)
        else:
            rest.append(word)
    return found, rest


def group_of(state, name):
    if name not in state["groups"]:
        fail(f'  Volume group "{name}" not found\n  Cannot process volume group {name}')
    return state["groups"][name]


def percent(used, size):
    return f"{100 * used / size:.2f}"


def lvs(state, argv):
    given, (group,) = options(argv, ("--reportformat", "--units", "-o"), ("--nosuffix",))
    rows, fields = [], given["-o"][0].split(",")
    for name, lv in group_of(state, group)["lvs"].items():
        row = {"lv_name": name, "lv_size": lv["mib"] * MIB, "lv_tags": ",".join(sorted(lv["tags"]))}
        row |= {"segtype": lv["kind"], "pool_lv": lv.get("pool", ""), "lv_kernel_major": -1, "lv_kernel_minor": -1}
        if lv.get("loop"):
            number = os.stat(lv["loop"]).st_rdev
            row |= {"lv_kernel_major": os.major(number), "lv_kernel_minor": os.minor(number)}
        if lv["kind"] == "thin-pool":
            row |= {"zero": "zero" if lv["zero"] else "", "lv_when_full": lv["when_full"]}
            row |= {"data_percent": lv["data"], "metadata_percent": lv["metadata"]}
        rows.append({field: str(row.get(field, "")) for field in fields})
    print(json.dumps({"report": [{"lv": rows}]}))


def lvcreate(state, argv):
    given, (group,) = options(argv, ("--addtag", "-n", "-L", "-V", "--thinpool"), ("-y", "-q", "-Wn", "-Zn"))
    found, (name,) = group_of(state, group), given["-n"]
    if name in found["lvs"]:
        fail(f'  Logical Volume "{name}" already exists in volume group "{group}"')
    thin = "--thinpool" in given
    mib = int(given["-V" if thin else "-L"][0].removesuffix("m"))
    if not thin and mib > found["free"]:
        fail(f'  Volume group "{group}" has insufficient free space ({found["free"] // 4} extents): {mib // 4} required.')
    path = HERE / f"{group}-{name}.img"
    with path.open("wb") as file:
        if not thin:
            for _ in range(mib):
                file.write(b"STALE secret of another tenant\n." * (MIB // 32))
        file.truncate(mib * MIB)
    loop = subprocess.run(["losetup", "--find", "--show", path], check=True, capture_output=True, text=True).stdout.strip()
    lv = {"mib": mib, "tags": given.get("--addtag", []), "kind": "thin" if thin else "linear", "loop": loop}
    found["lvs"][name] = lv | ({"pool": given["--thinpool"][0]} if thin else {})
    found["free"] -= 0 if thin else mib
    print("  WARNING: Logical volume not zeroed.", file=sys.stderr)


def lvremove(state, argv):
    _, (path,) = options(argv, (), ("-y", "-f"))
    group, _, name = path.partition("/")
    found = group_of(state, group)
    lv = found["lvs"].get(name)
    if lv is None:
        fail(f'  Failed to find logical volume "{path}"')
    subprocess.run(["losetup", "--detach", lv["loop"]], check=True)
    (HERE / f"{group}-{name}.img").unlink()
    del found["lvs"][name]
    found["free"] += 0 if "pool" in lv else lv["mib"]


def main():
    program, argv = Path(sys.argv[0]).name, sys.argv[1:]
    with open(HERE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads((HERE / "state.json").read_text())
        fault = state["faults"].get(program)
        with open(HERE / "transcript", "a") as transcript:
            transcript.write(" ".join([program, *argv]) + "\n")
        if fault in ("hang", "garbage"):
            print("Log: 7 { not json")
            time.sleep(600 if fault == "hang" else 0)
            return
        if fault:
            fail(fault)
        if program == "blkdiscard":
            os.execv("/usr/sbin/blkdiscard", sys.argv)
        {"lvs": lvs, "lvcreate": lvcreate, "lvremove": lvremove}[program](state, argv)
        (HERE / "state.new").write_text(json.dumps(state))
        os.replace(HERE / "state.new", HERE / "state.json")


if __name__ == "__main__":
    main()
