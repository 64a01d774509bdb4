"""nfs-ganesha as a gateway: one a mount, on a TCP port of the node that only the lease's VM reaches.

Contract: ganesha-config(8), ganesha-core-config(8), ganesha-export-config(8) of version 4.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import sys
from typing import Any

from wnodes_core.api import Export, Process
from wnodes_core.errors import HostError, NoProvider
from wnodes_core.storage import confine, nfs_handles, nfs_serve
from wnodes_core.tools import clean_environment, kill, spawn, table

_MODULE = "wnodes_core.storage.nfs_serve"
_PLUGINS = ("/usr/lib/ganesha", "/usr/lib64/ganesha", "/usr/lib/x86_64-linux-gnu/ganesha")
_START_S = 45.0  # more than its parts may take together
# All squashed, whoever the client is. No user's word is in it: numbers and addresses of ours only.
# What the host itself does to the files is seen after a second and not after a minute. Folders are read anew: what is
# remembered of one would be asked for by handles, and whose name the kernel forgot is stale (nfs_handles): so were
# whole listings. And one gateway is not taken for another of the same host, which else says the same of itself and
# may hand out the same client's number.
_CONFIG = """NFS_CORE_PARAM {{ NFS_Port = {port}; Protocols = 4; Enable_UDP = false; Enable_NLM = false;
    Enable_RQUOTA = false; fsid_device = true; }}
NFS_KRB5 {{ Active_krb5 = false; }}
NFSv4 {{ Graceless = true; RecoveryBackend = fs; Minor_Versions = 1,2; Delegations = false;
    Only_Numeric_Owners = true; Allow_Numeric_Owners = true;
    Server_Owner = "{node}:{port}"; Server_Scope = "{node}:{port}"; }}
MDCACHE {{ Dir_Chunk = 0; }}
EXPORT {{ Export_Id = 1; Path = "{place}"; Pseudo = "/share"; Protocols = 4; Transports = TCP; SecType = sys;
    Attr_Expiration_Time = 1; Access_Type = NONE; Squash = All_Squash; Anonymous_Uid = {uid}; Anonymous_Gid = {gid};
    CLIENT {{ Clients = {local}; Access_Type = {access}; Squash = All_Squash;
        Anonymous_Uid = {uid}; Anonymous_Gid = {gid}; PrivilegedPort = true; }}
    PrivilegedPort = true; FSAL {{ Name = VFS; }} }}
"""

_started: dict[str, Any] = {}  # Popen of this process, by the export's name: whoever started it reaps it


def problem() -> str:
    """'' if this host has all that it takes."""
    if not os.access(nfs_serve.SERVER, os.X_OK):
        return "no ganesha.nfsd on this host; install nfs-ganesha"
    if not any(os.path.exists(f"{folder}/libfsalvfs.so") for folder in _PLUGINS):
        return "ganesha has no VFS here; install nfs-ganesha-vfs"
    return confine.usable() or nfs_handles.usable()


def config(export: Export, place: str) -> str:
    """The server's configuration; ``place`` is where its root has the folder.

    As all are squashed, only guest root may call, by a port of root's: a second account there would be the job's user.
    """
    access = "RO" if export.read_only else "RW"
    told = {name: getattr(export, name) for name in ("node", "port", "uid", "gid", "local")}
    return _CONFIG.format(access=access, place=place, **told)


def start(export: Export) -> dict[str, Any]:
    """Start the gateway, in place of one that an earlier attempt left. Raises HostError, NoProvider."""
    if lacks := problem():
        raise HostError(lacks)
    stop(export)
    place = f"/{secrets.token_hex(16)}"
    told = {**export.to_dict(), "config": config(export, place), "place": place}
    reader, writer = os.pipe()
    heard, saying = os.pipe()
    try:
        argv = [sys.executable, "-I", "-m", _MODULE, export.name]
        # stderr: wnodesd's log.
        child = spawn(argv, stdin=reader, stdout=saying, stderr=2, environ=clean_environment())
        os.close(saying)
        saying = -1
        os.write(writer, json.dumps(told).encode())  # shorter than a pipe's room
        os.close(writer)
        writer = -1
        words = _answer(heard)
    finally:
        for fd in (reader, writer, heard, saying):
            if fd >= 0:
                os.close(fd)
    if "port" in words:
        _started[export.name] = child
        return {"port": export.port, "path": "/share", "node": export.node, "local": export.local}
    child.kill()
    child.wait()
    raise NoProvider(str(words.get("problem") or "the gateway ended at once"))


def _answer(heard: int) -> dict[str, Any]:
    said = b""
    while not said.endswith(b"\n"):
        if not select.select([heard], [], [], _START_S)[0]:
            return {"problem": f"no gateway after {_START_S:.0f} s"}
        data = os.read(heard, 4096)
        if not data:
            break
        said += data
    answer: dict[str, Any] = json.loads(said or b"{}")
    return answer


def stop(export: Export) -> None:
    """End the gateway; idempotent, in any process of root's. Raises HostError."""
    for process in processes_of(export.name):
        if not kill(process):
            raise HostError(f"NFS gateway {process.pid} does not end", hint="its file system hangs: see the kernel log")
    if child := _started.pop(export.name, None):
        child.wait()


def processes_of(name: str) -> list[Process]:
    """Root's own processes that are this gateway: who serves before who answers for it."""
    pid_file = f"/run/ganesha/{name}.pid"
    ours = [each for each in table(command_of_users=False) if each.uid == 0]
    serving = [each for each in ours if each.command[:1] == (nfs_serve.SERVER,) and pid_file in each.command]
    return serving + [each for each in ours if each.command[-2:] == (_MODULE, name)]
