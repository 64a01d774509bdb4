"""The exports of this node's leases: folders that root offers to their VMs, made and taken back in wnodesd only.

Nothing is remembered but in the leases' journals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from wnodes_core.agent.leases import Lease
from wnodes_core.errors import NoProvider, WnodesError
from wnodes_core.exports import Export
from wnodes_core.journal import Resource

log = logging.getLogger("wnodesd")
KIND = "export"  # of the resource in a lease's journal


class Exports:
    """One a node. All of it blocks."""

    def __init__(self, hook: Callable[[], Any], run_dir: str) -> None:
        self._hook = hook
        self._folder = f"{run_dir}/exports"

    def ports_for(self, plan: Mapping[str, Any]) -> tuple[int, ...]:
        """The TCP ports of the node that the plan's exports want, in their order; 0 = one of its own."""
        return tuple(port for _, _, port in self._wanted(plan))

    def attach(self, lease: Lease, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Make the exports of a lease that has its port, journalled: what of them belongs in the plan.

        Anew for a lease that has them. One that cannot be made is told of in the plan: another provider may
        serve that mount. Raises WnodesError if one cannot be taken back.
        """
        made = {}
        nic, port = plan["nic"], plan["port"]
        wanted = list(self._wanted(plan)) if nic["kind"] == "tap" and nic["node"] else []
        # Where the node had too few ports the last mounts get none.
        for (index, provider, _), number in zip(wanted, port["own_ports"], strict=False):
            mount = plan["mounts"][index]
            export = Export(
                lease=lease.id,
                index=index,
                provider=provider,
                source=mount["source"],
                read_only=mount["read_only"],
                uid=lease.job.uid,
                gid=lease.job.gid,
                groups=tuple(plan["user"]["groups"].values()),
                node=port["node"],
                local=port["local"],
                port=number,
                folder=f"{self._folder}/{lease.id}/{index}",
            )
            made[str(index)] = self._made(lease, export)
        return {"exports": made}

    def _wanted(self, plan: Mapping[str, Any]) -> Iterator[tuple[int, str, int]]:
        """Number, provider and port of each mount of which an export is to be made."""
        told = {each["provider"]: each for each in reversed(self._hook().wnodes_mount_usable())}
        order = [told[name] for name in plan.get("storage", ()) if name in told]
        kinds = [each.get("needs", "") for each in order]
        reached = order[: kinds.index("")] if "" in kinds else order  # what stands behind one that always serves
        first = next((each for each in reached if each.get("needs") == "export"), None)
        if first:
            port = int(first.get("port") or 0)
            yield from ((index, first["provider"], port) for index in range(len(plan.get("mounts", ()))))

    def _made(self, lease: Lease, export: Export) -> dict[str, Any]:
        resource = lease.journal.making(KIND, export.name, **export.to_dict())
        try:
            if export.uid == 0:
                raise NoProvider("root's files are not exported")
            found: dict[str, Any] | None = self._hook().wnodes_mount_export(export=export)
            if found is None:
                raise NoProvider(f"no plug-in makes exports for {export.provider!r}")
        except (WnodesError, OSError) as error:
            words = error.message if isinstance(error, WnodesError) else str(error)
            log.warning("export of mount %d: %s", export.index, words, extra={"event": "export", "lease": lease.id})
            self.detach(resource)
            lease.journal.gone(resource)
            return {"problem": words}
        lease.journal.made(resource)
        return found

    def detach(self, resource: Resource) -> None:
        """Undo an export of a journal; idempotent. Raises WnodesError if something of it is left."""
        export = Export.from_dict(resource.data)
        if export.uid and not self._hook().wnodes_mount_unexport(export=export):
            raise WnodesError(f"no plug-in knows how to take back an export for {export.provider!r}")
