"""wnodesd with a fake batch system, image store and policy, for its tests.

``python -I wnodesd_main.py CONFIG.json``. The journal can be told to kill the process right after
its n-th line, which is how the crash tests drive it; production code knows nothing of that.
"""

import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from wnodes_core import command
from wnodes_core.agent import logs, server
from wnodes_core.agent.daemon import Parts
from wnodes_core.errors import TransientError, UnknownImage
from wnodes_core.journal import Journal
from wnodes_core.model import Image, Job, Owner
from wnodes_core.network import bridge
from wnodes_core.settings.network import NetworkRule, NetworkSettings
from wnodes_core.settings.schema import Rule, StorageSettings, VmSettings, WarmSettings
from wnodes_core.settings.scratch import ScratchSettings
from wnodes_core.storage import lvm, nfs


class Hook:
    """The fake batch system: a root-owned process says ``fakejob=ID:long`` in its argv."""

    def __init__(self, config):
        self.config = config

    def wnodes_lrms_owner(self, ancestry):
        for process in ancestry:
            words = [re.fullmatch(r"fakejob=(\w+):(long|short)", word) for word in process.command]
            match = next(filter(None, words), None)
            if match and process.uid == 0:
                return Owner(match[1], "0", process, match[2] == "long", "n0")
        return None

    def wnodes_lrms_claim(self, owner, uid, gid):
        return Job("fake", owner.job_id, "n0", uid, gid, "u") if self.config.get("claims") else None

    def wnodes_lrms_homes(self, owner, processes):
        return next((p for p in processes if f"fakehome={owner.job_id}" in p.command and p.uid == 0), None)

    def wnodes_lrms_facts_query(self, job):
        return ["cat", self.config["live"]] if self.config.get("claims") else None

    def wnodes_lrms_facts_parse(self, job, text):
        if job.job_id not in text.split():
            raise TransientError(f"job {job.job_id} is not known to run")
        return job

    def wnodes_lrms_live_query(self, node):
        return ["cat", self.config["live"]]

    def wnodes_lrms_live_parse(self, text):
        return frozenset(text.split())

    def wnodes_lrms_advertise_query(self, node):
        return [["echo", f"seen-{node}"]]

    def wnodes_lrms_advertise(self, node, capacity):
        words = [node, capacity["published"].strip(), capacity["accel"], *capacity["images"]]
        words += [f"warm_{name}" for name in capacity["templates"]]
        return [["touch", self.config["live"] + "." + ",".join(words)]]

    # Ports are real, where the test has given the daemon a network namespace to make them in.
    wnodes_port_allot = staticmethod(bridge.wnodes_port_allot)
    wnodes_port_attach = staticmethod(bridge.wnodes_port_attach)
    wnodes_port_detach = staticmethod(bridge.wnodes_port_detach)

    # Exports, too: of the mounts of those requests that have any.
    wnodes_mount_export = staticmethod(nfs.wnodes_mount_export)
    wnodes_mount_unexport = staticmethod(nfs.wnodes_mount_unexport)

    def wnodes_mount_usable(self):
        return [nfs.wnodes_mount_usable()]

    # Volumes are made by a fake LVM's programs, where the test has given the daemon a folder of them.
    wnodes_volume_attach = staticmethod(lvm.wnodes_volume_attach)
    wnodes_volume_detach = staticmethod(lvm.wnodes_volume_detach)

    def wnodes_volume_list(self, **given):
        return [lvm.wnodes_volume_list(**given)]

    def wnodes_request_admit(self, request, job):
        return []

    def wnodes_lease_changed(self, lease, event):
        if event == "held":
            raise RuntimeError("an observer's bug")


class Store:
    """Images ``known`` and ``slow`` (it comes when a file ``CONFIG.slow`` appears); marks are files."""

    def __init__(self, config):
        self.config = config
        self.marks = Path(config["state_dir"], "marks")

    def resolve(self, ref, user):
        if ref.name not in ("known", "slow"):
            raise UnknownImage(f"image {ref}: no such image")
        return ref

    def ensure(self, entry, progress, deadline):
        progress(1 << 20, 4 << 20)
        while entry.name == "slow" and not os.path.exists(self.config["slow"]):
            time.sleep(0.02)
        return self.image(entry)

    def take(self, entry, lease, uid):
        self.marks.mkdir(exist_ok=True)
        (self.marks / lease).touch()

    def release(self, lease):
        (self.marks / lease).unlink(missing_ok=True)

    def entries(self):
        return [SimpleNamespace(name="known"), SimpleNamespace(name="far")]

    def image(self, entry):
        return Image(entry.name, "", "sha256:" + "0" * 64, "/dev/null", "raw") if entry.name != "far" else None

    def purge(self, settings):
        return []


@dataclass
class Crash:
    """Where to die: after the n-th journal line of this process; 0 = never."""

    at: int = 0
    lines: int = 0


crash = Crash()


class CrashingJournal(Journal):
    """A journal whose process does not survive its n-th line."""

    def _append(self, op, resource):
        super()._append(op, resource)
        crash.lines += 1
        if crash.lines == crash.at:
            os.kill(os.getpid(), signal.SIGKILL)


def make_plan(request, job, image, settings, accel, *, lease, folder, template):
    mounts = [asdict(each) for each in request.mounts]
    more = {"mounts": mounts, "storage": ["nfs"], "user": {"groups": {"u": job.gid}}} if mounts else {}
    return {"lease": lease, "image": image.name, "accel": accel, "job": job.to_dict(), **more}


def networks(rules):
    lists = [{key: tuple(each) if isinstance(each, list) else each for key, each in rule.items()} for rule in rules]
    return NetworkSettings(networks=tuple(NetworkRule(**rule) for rule in lists))


def main():
    config = json.loads(Path(sys.argv[1]).read_text())
    crash.at = config.get("crash_at", 0)
    command.PATH = config.get("path", command.PATH)
    settings = SimpleNamespace(
        state_dir=config["state_dir"],
        run_dir=config["run_dir"],
        accel="auto",
        images=SimpleNamespace(folder=config["state_dir"] + "/images", fetch_timeout_s=60, purge=None),
        plugins=SimpleNamespace(disabled=()),
        warm=WarmSettings(folder=config["state_dir"] + "/templates"),
        storage=StorageSettings(),
        scratch=ScratchSettings(**config.get("scratch", {})),
        vm=VmSettings(),
        network=networks(config.get("networks", [])),
        policy=tuple(Rule(**{k: tuple(v) for k, v in rule.items()}) for rule in config.get("policy", [])),
        lrms={"fake": {"advertise": True, "node": "n0"}},
        daemon=SimpleNamespace(
            socket=config["run_dir"] + "/wnodesd.sock",
            metrics="unix:" + config["run_dir"] + "/metrics.sock",
            slots=3,
            sweep_interval_s=config.get("sweep_s", 3600),
        ),
    )
    hook = Hook(config)
    parts = Parts(
        settings=settings,
        hook_for=lambda lrms: hook,
        admit=lambda request, job, settings, hook: request,
        store=Store(config),
        make_plan=make_plan,
        probe=lambda: {"accel": "tcg"},
        person=lambda uid: None,
        journal=CrashingJournal,
        end_grace_s=config.get("grace_s", 5.0),
        hold_timeout_s=config.get("hold_timeout_s", 60.0),
        retry_s=0.1,
    )
    logs.set_up("json", "info")
    server.serve(parts)


if __name__ == "__main__":
    main()
