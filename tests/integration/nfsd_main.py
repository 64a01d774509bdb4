"""In a guest whose kernel has an NFS server: exports by it, mounted by the guest itself. The last line is what was seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from wnodes_core.api import Export, Mount
from wnodes_core.errors import WnodesError
from wnodes_core.storage import nfs, nfs_kernel
from wnodes_core.testing.nfs_client import NfsClient, NfsError, host_handle

JOB, OTHER = 1234, 1235
HOST = "127.0.0.1"
TOP = "/srv/top"
EXPORT = Export("l-1", 0, "nfs", f"{TOP}/home", False, JOB, JOB, (JOB,), HOST, HOST, nfs_kernel.PORT, "/run/wnodes/exports/l-1/0")
ONLY_READ = replace(EXPORT, index=1, read_only=True, folder="/run/wnodes/exports/l-1/1")


def sh(script: str) -> str:
    done = subprocess.run(["sh", "-c", f"exec 2>&1; {script}"], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout


def serve() -> None:
    """As nfs-server.service does; version 4 alone, and nobody waits for clients of an earlier life."""
    for folder in ("/var/lib/nfs/v4recovery", f"{TOP}/home", f"{TOP}/closed", "/run/rpc_pipefs"):
        os.makedirs(folder)
    os.chmod(f"{TOP}/closed", 0o700)
    os.chown(f"{TOP}/home", JOB, JOB)
    for name, owner, mode in (("home/file", JOB, 0o644), ("home/theirs", OTHER, 0o600), ("closed/secret", OTHER, 0o644)):
        Path(TOP, name).write_text(f"{name}\n")
        os.chown(f"{TOP}/{name}", owner, owner)
        os.chmod(f"{TOP}/{name}", mode)
    print(sh("ip link set lo up; mount -t nfsd nfsd /proc/fs/nfsd; touch /var/lib/nfs/etab /var/lib/nfs/rmtab /etc/exports;"
             " rpc.mountd -N 2 -N 3; rpc.nfsd -N 3 --host 127.0.0.1 4; echo Y >/proc/fs/nfsd/v4_end_grace"), file=sys.stderr)


def mounted(export: Export, target: str) -> str:
    told = {"port": f"m{export.index}", "export": nfs.wnodes_mount_export(export=export)}
    made = nfs.wnodes_mount_attach(Mount(export.source, target, export.read_only), "", told, "nfs")
    assert made is not None
    argv = made["guest"][1]["argv"]
    os.makedirs(target)
    done = subprocess.run([*argv[:-1], target], capture_output=True, text=True, check=False)
    return done.stderr.strip()


def handles(real: bytes, name: str) -> list[bytes]:
    """Handles of a file, in each form that nfsd's version 1 has of it (fs/nfsd/nfsfh.h, include/linux/exportfs.h).

    After the head (the share's inode and identity) the file system's own part, 16 bytes of it here, with and without the folder:
    its own, or the share's, as if the file lay there.
    """
    own, parent = host_handle(f"{TOP}/{name}"), host_handle(os.path.dirname(f"{TOP}/{name}".rstrip("/")))
    forms = ((1, own), (2, own + parent), (2, own + host_handle(f"{TOP}/home")))
    return [real[:3] + bytes([kind]) + real[4:-16] + ids for kind, ids in forms]


def tried(work: Callable[[], object]) -> str:
    try:
        return f"GOT {work()!r}"
    except NfsError as error:
        return str(error.code)


def attack(seen: dict[str, object]) -> None:
    """As guest root, by a client of its own, under both uids."""
    client = NfsClient(HOST, nfs_kernel.PORT, source_port=600)
    path = EXPORT.folder.strip("/").split("/")
    real = client.handle(*path, "file")
    seen["elsewhere"] = [
        tried(lambda name=name: client.handle(*name))  # type: ignore[misc]
        for name in (("etc",), ("srv",), ("run", "wnodes", "other"), (*path, "..", ".."))
    ]
    inside = handles(real, "home/file")
    outside = [each for name in ("closed/secret", "closed", "") for each in handles(real, name)]
    seen["inside"] = [tried(lambda: client.read(inside[1]))]
    seen["forged"] = []
    for port, uid in enumerate((0, JOB, OTHER), 601):
        other = NfsClient(HOST, nfs_kernel.PORT, uid=uid, gid=uid, source_port=port)
        for handle in outside:
            work = (lambda: other.read(handle), lambda: other.names(handle), lambda: other.write(handle, b"x"))  # noqa: B023
            seen["forged"] += [tried(each) for each in work]
    # The same with the defence taken out, or the answers above prove nothing.
    bare = nfs_kernel.options(EXPORT).replace("subtree_check", "no_subtree_check")
    print(sh(f"exportfs -o {bare} {HOST}:{EXPORT.folder}"), file=sys.stderr)
    seen["undefended"] = [tried(lambda: client.read(outside[0]))]
    seen["kept"] = Path(TOP, "closed/secret").read_text()


def main() -> None:
    seen: dict[str, object] = {"before": nfs_kernel.there()}
    serve()
    seen["usable"] = nfs.wnodes_mount_usable()
    seen["mounted"] = [mounted(EXPORT, "/data"), mounted(ONLY_READ, "/ro")]
    seen["mounts"] = sh("grep ' nfs4 ' /proc/mounts")
    seen["file"] = sh("cd /data; cat file; echo new >new; stat -c %u:%g new; cat theirs; mknod null c 1 3; echo x >theirs; chown 0 file")
    seen["owner"] = os.stat(f"{TOP}/home/new").st_uid if os.path.exists(f"{TOP}/home/new") else None
    seen["read only"] = sh("cat /ro/file; echo x >/ro/y; mount -o remount,rw /ro; echo x >/ro/y")
    seen["etab"] = sh("exportfs -s")
    attack(seen)
    subprocess.run(["umount", "-l", "/data", "/ro"], check=False)
    for each in (EXPORT, ONLY_READ):
        try:
            nfs.wnodes_mount_unexport(export=each)
        except WnodesError as error:
            seen[f"left {each.index}"] = str(error)
    seen["left"] = sh("exportfs -s; grep wnodes /proc/self/mounts; ls /run/wnodes/exports")
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
