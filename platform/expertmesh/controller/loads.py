"""What the groups do right now: the engines' own figures, and what gateways have sent to them."""

from collections.abc import Collection, Iterable, Mapping

from expertmesh.core.domain.fleet import GroupLoad, GroupState, RankInfo
from expertmesh.core.scaling.contract import GroupRecord

_SERVING = (GroupState.READY, GroupState.DRAINING)


class EngineLoads:
    """The newest answer of each rank.

    A busy rank may miss a probe: its last answer then stands, so that its group does not look idle.
    """

    def __init__(self) -> None:
        self._ranks: dict[str, dict[int, RankInfo]] = {}

    def saw(self, ranks: Iterable[RankInfo | None]) -> None:
        for info in ranks:
            if info is not None:
                self._ranks.setdefault(info.group, {})[info.rank] = info

    def keep(self, groups: Collection[str]) -> None:
        """Forgets all others."""
        self._ranks = {name: ranks for name, ranks in self._ranks.items() if name in groups}

    def of(self, record: GroupRecord, in_flight: int) -> GroupLoad:
        """Only of a group that serves: what a broken gang did last is no load of today."""
        world = record.spec.parallelism.data
        known = self._ranks.get(record.spec.name, {}) if record.state in _SERVING else {}
        ranks = [info for index, info in known.items() if index < world]
        if not ranks:
            return GroupLoad(in_flight=in_flight)
        return GroupLoad(
            in_flight=in_flight,
            running=sum(info.running for info in ranks),
            waiting=sum(info.waiting for info in ranks),
            kv_usage=sum(info.kv_usage for info in ranks) / len(ranks),
            kv_tokens=sum(info.kv_tokens for info in ranks),
            max_running=sum(info.max_running for info in ranks),
        )


def group_loads(
    records: Iterable[GroupRecord], engines: EngineLoads, in_flight: Mapping[str, int]
) -> dict[str, GroupLoad]:
    return {
        record.spec.name: engines.of(record, in_flight.get(record.spec.name, 0))
        for record in records
    }
