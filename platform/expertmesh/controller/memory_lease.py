"""A lease in this process's memory: for the only controller of a system, which always leads."""

from dataclasses import replace

from expertmesh.core.domain.lease import LeaseRecord


class MemoryLease:
    def __init__(self) -> None:
        self._record = LeaseRecord(holder=None)

    async def read(self) -> LeaseRecord:
        return self._record

    async def write(self, wanted: LeaseRecord) -> LeaseRecord | None:
        if wanted.version != self._record.version:
            return None
        self._record = replace(wanted, version=str(int(wanted.version or 0) + 1))
        return self._record
