"""Our provider on real LVM, in a guest: ``python3 lvm_main.py DISK`` plays every case and prints how each ended.

The disk becomes the volume group ``vg0`` (32 MiB are left for plain volumes, a thin pool of 24 MiB, a stranger's volume). A
case is a function ``case_…``; the output is one JSON object, name to '' or traceback. Run as root, on the guest's own
devices only.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from wnodes_core.agent import leases
from wnodes_core.agent.ending import Undoer
from wnodes_core.agent.volumes import Volumes
from wnodes_core.errors import HostBusy, HostError, TransientError
from wnodes_core.journal import Journal
from wnodes_core.model import Job, VmRequest
from wnodes_core.settings.scratch import ScratchSettings
from wnodes_core.storage import lvm
from wnodes_core.volumes import Volume

BASE = os.environ.get("STATE_DIRECTORY", "/root")  # under a systemd unit nothing else can be written
OWNER, UID = "0123456789ab", 64321
FOLDER = f"/dev/wnodes/{OWNER}"
SECRET = b"STALE secret of another tenant\n."
real_run = lvm.run


def sh(*argv, check=True, **more):
    done = subprocess.run(argv, capture_output=True, **more)
    assert not check or done.returncode == 0, (argv, done.stderr)
    return done


def set_up(disk):
    for module in ("dm-mod", "dm-thin-pool"):
        sh("modprobe", module)
    sh("vgcreate", "-q", "vg0", disk)
    sh("lvcreate", "-q", "-y", "-n", "precious", "-L", "4m", "vg0")
    Path("/dev/vg0/precious").write_bytes(SECRET * (4 << 15))
    sh("lvcreate", "-q", "-y", "--type", "thin-pool", "-Zy", "-c", "64k", "-L", "24m", "-n", "pool", "vg0")
    sh("lvchange", "-q", "--errorwhenfull", "y", "vg0/pool")
    # Little is left over, so that little has to be written.
    free = int(sh("vgs", "--noheadings", "--units", "m", "--nosuffix", "-o", "vg_free", "vg0").stdout.decode().partition(".")[0])
    sh("lvcreate", "-q", "-y", "-n", "filler", "-L", f"{free - 32}m", "vg0")


def volume(name="slurm-n0-12_3-ab12cd", **changes):
    made = Volume(name, "vg0", OWNER, "", size_mib=8, uid=UID, gid=UID)
    return replace(made, node=f"{FOLDER}/{made.name}", **changes)


def ours():
    return {each.name for each in lvm.volumes_of("vg0") if each.name.startswith("wnodes-")}


def pool():
    return next(each for each in lvm.volumes_of("vg0") if each.name == "pool")


@contextmanager
def attached(*volumes):
    try:
        for each in volumes:
            assert lvm.wnodes_volume_attach(volume=each)
        yield
    finally:
        for each in volumes:
            assert lvm.wnodes_volume_detach(volume=each)
    assert not ours() and not os.path.exists(volumes[0].node)


def as_user(*argv):
    return subprocess.run(argv, user=UID, group=UID, extra_groups=[], capture_output=True)


def dirty():
    """Fill all that is free of the group with somebody's words, and give it back."""
    sh("lvcreate", "-q", "-y", "-n", "dirt", "-l", "100%FREE", "vg0")
    with open("/dev/vg0/dirt", "wb", buffering=0) as file:
        try:
            while file.write(SECRET * 32768):
                pass
        except OSError:
            os.fsync(file.fileno())
    sh("lvremove", "-q", "-f", "vg0/dirt")


def refused(kind, words, made):
    try:
        lvm.wnodes_volume_attach(volume=made)
    except kind as error:
        assert type(error) is kind and words in error.message, error
    else:
        raise AssertionError(f"not refused: {made}")
    finally:
        lvm.wnodes_volume_detach(volume=made)
    assert not ours()


def case_the_commands_are_those_that_were_reviewed():
    for kind, made in (("plain", volume(size_mib=16)), ("thin", volume(size_mib=16, pool="pool"))):
        said = []
        lvm.run = lambda argv, said=said, **more: said.append(" ".join(argv)) or real_run(argv, **more)
        with attached(made):
            lvm.wnodes_volume_list("vg0", OWNER, FOLDER)
        text = "\n".join(said[: said.index(f"lvremove -y -f vg0/{made.name}") + 1]).replace(made.node, "NODE") + "\n"
        assert text == Path(__file__).with_name(f"{kind}.txt").read_text(), text
        lvm.run = real_run


def case_the_fake_reports_what_lvm_does():
    """Fields, and what stands in them for a pool, a thin volume, a plain one; and a pool promises no more than it has."""
    odd = volume("slurm-n_tdata_mimage_0-1_cmeta-ab12cd", size_mib=4)  # names that LVM keeps for itself
    with attached(volume(pool="pool", size_mib=20), odd):
        rows = lvm._report(["lvs", *lvm._REPORT, "-o", lvm._FIELDS, "vg0"])
        by_kind = {row["segtype"]: row for row in rows}
        assert set(by_kind) == {"linear", "thin", "thin-pool"}
        assert all(list(row) == lvm._FIELDS.split(",") for row in rows)
        assert (by_kind["thin-pool"]["zero"], by_kind["thin-pool"]["lv_when_full"]) == ("zero", "error")
        assert by_kind["thin"]["pool_lv"] == "pool" and by_kind["linear"]["pool_lv"] == ""
        assert by_kind["thin"]["lv_tags"] == f"wnodes,wnodes.{OWNER}"
        assert float(by_kind["thin-pool"]["metadata_percent"]) > 0
        try:
            lvm.wnodes_volume_attach(volume=volume("other", pool="pool"))
        except HostBusy as error:
            assert "4 MiB of thin pool vg0/pool are not promised yet" in error.message, error
        else:
            raise AssertionError("promised twice")


def case_a_plain_volume_shows_no_byte_of_an_earlier_tenant():
    dirty()
    made = volume(size_mib=28)
    wipe, lvm._wipe = lvm._wipe, lambda volume: None
    with attached(made):
        assert SECRET in Path(made.node).read_bytes(), "there is something to see if nobody wipes it"
        lvm._wipe = wipe
        assert lvm.wnodes_volume_attach(volume=made), "anew, for a second start"
        assert not any(Path(made.node).read_bytes())


def case_a_thin_volume_shows_no_byte_of_an_earlier_tenant():
    made = volume(pool="pool", size_mib=12)
    with attached(made):
        Path(made.node).write_bytes(SECRET * (12 << 15))
    with attached(made):
        with open(made.node, "r+b", buffering=0) as file:
            for chunk in range(12 << 4):  # one sector of each chunk of 64 KiB: all of them are taken again
                os.pwrite(file.fileno(), b"x" * 512, chunk << 16)
            os.fsync(file.fileno())
        sh("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches")
        assert SECRET not in Path(made.node).read_bytes()
    assert pool().data < 1, "what was removed is the pool's again"


def case_a_pool_that_does_not_zero_is_refused():
    sh("lvchange", "-q", "--zero", "n", "vg0/pool")
    try:
        refused(HostError, "what others wrote", volume(pool="pool"))
    finally:
        sh("lvchange", "-q", "--zero", "y", "vg0/pool")


def case_its_user_and_nobody_else_opens_it_and_makes_the_file_system():
    made = volume()
    with attached(made):
        assert as_user("head", "-c1", made.node).returncode == 0
        assert as_user("head", "-c1", f"/dev/mapper/{'vg0-' + made.name.replace('-', '--')}").returncode == 1
        done = as_user("rm", made.node)
        assert done.returncode and os.path.exists(made.node)
        code = f"import sys; sys.path.insert(0, {sys.path[0]!r})\n"
        code += "from wnodes_core.storage import scratch; from wnodes_core.model import Disk\n"
        code += f"assert scratch.wnodes_disk_create(disk=Disk({made.node!r}, 'raw', size_mib=8, block=True))"
        done = as_user(sys.executable, "-c", code)
        assert done.returncode == 0, done.stderr
        full = f"{BASE}/full"
        os.makedirs(full, exist_ok=True)
        sh("mount", "-t", "ext4", made.node, full)
        done = sh("sh", "-c", f"head -c 9M /dev/zero >{full}/x", check=False)
        sh("umount", full)
        assert done.returncode and b"No space left" in done.stderr, "a full scratch is its own ENOSPC"
        sh("e2fsck", "-fn", made.node)


def case_a_full_group_is_for_another_node():
    refused(HostBusy, "insufficient free space", volume(size_mib=36))


def case_an_exhausted_pool_is_the_writers_error_and_nobody_elses():
    one, two = (volume(name, pool="pool", size_mib=20, promise_percent=300) for name in ("one", "two"))
    with attached(one, two):
        Path(one.node).write_bytes(SECRET * (20 << 15))
        began = time.monotonic()
        try:
            with open(two.node, "r+b", buffering=0) as file:
                for piece in range(20):
                    os.pwrite(file.fileno(), SECRET * 32768, piece << 20)
                os.fsync(file.fileno())
        except OSError as error:
            print("exhausted:", error, file=sys.stderr)
        else:
            raise AssertionError("24 MiB took 40")
        assert time.monotonic() - began < 30, "it did not queue"
        assert Path(one.node).read_bytes() == SECRET * (20 << 15), "what the other wrote is there"
        assert Path("/dev/vg0/precious").read_bytes() == SECRET * (4 << 15)
        try:
            lvm.wnodes_volume_attach(volume=volume("three", pool="pool", promise_percent=900))
        except HostBusy as error:
            assert "% of the data of thin pool vg0/pool are used (limit 95 %)" in error.message, error
        else:
            raise AssertionError("a full pool took one more")
        lvm.wnodes_volume_detach(volume=two)
        with open(one.node, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"x", 0)
            os.fsync(file.fileno())
    assert pool().data < 1


def case_the_doctor_knows_a_pool_that_queues():
    assert lvm.problems("vg0", "pool") == []
    sh("lvchange", "-q", "--errorwhenfull", "n", "vg0/pool")
    try:
        assert "queues writes" in lvm.problems("vg0", "pool")[0][0]
    finally:
        sh("lvchange", "-q", "--errorwhenfull", "y", "vg0/pool")
    for group, name in (("vg7", ""), ("vg0", "precious")):
        try:
            lvm.problems(group, name)
        except HostError as error:
            assert "not found" in error.message or "no thin pool" in error.message, error
        else:
            raise AssertionError((group, name))


def case_strangers_are_left_alone():
    made = volume()
    sh("lvcreate", "-q", "-y", "-n", made.name, "-L", "4m", "vg0")
    sh("lvcreate", "-q", "-y", "--addtag", "wnodes", "--addtag", "wnodes.ffffffffffff", "-n", "wnodes-x", "-L", "4m", "vg0")
    try:
        assert lvm.wnodes_volume_detach(volume=made) is True
        try:
            lvm.wnodes_volume_attach(volume=made)
        except TransientError as error:
            assert "is not ours" in error.message
        assert lvm.wnodes_volume_list("vg0", OWNER, FOLDER) == []
        assert {made.name, "wnodes-x"} <= ours()
    finally:
        sh("lvremove", "-q", "-f", f"vg0/{made.name}", "vg0/wnodes-x")


def case_one_in_use_is_reported_and_goes_later():
    made = volume()
    lvm.wnodes_volume_attach(volume=made)
    with open(made.node, "rb") as file:
        user = subprocess.Popen(["sleep", "60"], stdin=file, user=UID, group=UID, extra_groups=[])
        try:
            lvm.wnodes_volume_detach(volume=made)
        except TransientError as error:
            assert "in use" in error.message and f"open in process {os.getpid()} (uid 0)" in error.message, error
        else:
            raise AssertionError("removed in use")
        assert user.wait(5) == -9, "the user's own process is ended"
        assert ours() == {made.name} and not os.path.exists(made.node)
    lvm.wnodes_volume_detach(volume=made)
    assert not ours()


class Node:
    """A wnodesd's volumes in a folder of its own."""

    def __init__(self):
        self.state, self.run = f"{BASE}/state", f"{BASE}/run"
        hook = SimpleNamespace(
            wnodes_volume_attach=lvm.wnodes_volume_attach,
            wnodes_volume_detach=lvm.wnodes_volume_detach,
            wnodes_volume_list=lambda **given: [lvm.wnodes_volume_list(**given)],
        )
        settings = ScratchSettings(volume_group="vg0")
        self.volumes = Volumes(lambda: settings, lambda: hook, self.state)
        self.undoer = Undoer(SimpleNamespace(release=lambda lease: None), lambda lease: None, {"volume": self.volumes})

    def lease(self):
        leases.folders(self.state, self.run)
        job = Job("fake", "7", "n0", UID, UID, "u")
        return leases.create(job, VmRequest(image="i", scratch_mib=8), self.state, self.run, Journal)

    def journals(self):
        return list(Path(self.state, "journal").glob("*.jsonl"))


def killed_after(node, step):
    """Whether a process that is killed after its n-th command came to its end before that."""
    pid = os.fork()
    if pid == 0:
        left = step

        def run(argv, **more):
            nonlocal left
            done, left = real_run(argv, **more), left - 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        lvm.run = run
        node.volumes.attach(node.lease())
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def case_killed_after_any_command_leaves_nothing_once_undone():
    node, step, over = Node(), 0, False
    while not over:
        step += 1
        over = killed_after(node, step)
        (path,) = node.journals()
        errors = node.undoer.undo(leases.load(path, Journal), job_over=True)
        assert not errors, errors
        assert not node.journals() and not list(Path(node.volumes._folder).glob("*")), step
    assert step == 5 and not ours(), step


def case_leftovers_without_a_journal_are_swept_and_leases_are_not():
    node = Node()
    kept, lost = node.lease(), node.lease()
    for each in (kept, lost):
        node.volumes.attach(each)
    sh("lvcreate", "-q", "-y", "--addtag", "wnodes", "--addtag", "wnodes.ffffffffffff", "-n", "wnodes-x", "-L", "4m", "vg0")
    os.unlink(lost.journal.path)
    before = ours()
    node.volumes.sweep(lambda: [path.stem for path in node.journals()])
    assert before - ours() == {f"wnodes-{lost.id}"}
    assert not node.undoer.undo(kept, job_over=True)
    sh("lvremove", "-q", "-f", "vg0/wnodes-x")
    assert not ours()


def play(names):
    """How each of these cases ended: '' or a traceback."""
    ends = {}
    for name in names:
        began = time.monotonic()
        try:
            globals()[name]()
            ends[name] = ""
        except Exception:  # noqa: BLE001 - it is what the output is for
            ends[name] = traceback.format_exc()
            lvm.run = real_run
        print(f"{time.monotonic() - began:5.1f} s {name}", file=sys.stderr, flush=True)
    return ends


def main():
    set_up(sys.argv[1])
    print(json.dumps(play([name for name in globals() if name.startswith("case_")])))


if __name__ == "__main__":
    main()
