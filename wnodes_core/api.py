"""All that an adapter or a plug-in may import from us (with ``wnodes_core.tools`` for providers)."""

from wnodes_core import errors
from wnodes_core.exports import Export
from wnodes_core.files import read_beneath
from wnodes_core.markers import hookimpl
from wnodes_core.model import (
    Boot,
    Channel,
    Disk,
    Filesystem,
    Image,
    ImageRef,
    Job,
    Mount,
    NativeCall,
    NativeReply,
    Owner,
    Process,
    Shape,
    Template,
    Vm,
    VmRequest,
    parse_size_mib,
)
from wnodes_core.phases import Phase
from wnodes_core.ports import Nic, Port, Route, mac_of
from wnodes_core.processes import environ_of, run_by_root
from wnodes_core.volumes import Volume

API_LEVEL = 1

__all__ = [
    "API_LEVEL",
    "Boot",
    "Channel",
    "Disk",
    "Export",
    "Filesystem",
    "Image",
    "ImageRef",
    "Job",
    "Mount",
    "NativeCall",
    "NativeReply",
    "Nic",
    "Owner",
    "Phase",
    "Port",
    "Process",
    "Route",
    "Shape",
    "Template",
    "Vm",
    "VmRequest",
    "Volume",
    "environ_of",
    "errors",
    "hookimpl",
    "mac_of",
    "parse_size_mib",
    "read_beneath",
    "run_by_root",
]
