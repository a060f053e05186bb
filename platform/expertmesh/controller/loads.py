"""What the groups do right now: the engines' own figures, and what gateways have sent to them."""

from collections.abc import Collection, Iterable, Mapping

from expertmesh.controller.gateways import NO_LATENCY, Latency
from expertmesh.controller.recent import Recent, rate
from expertmesh.core.domain.fleet import GroupLoad, GroupState, RankInfo
from expertmesh.core.scaling.contract import GroupRecord
from expertmesh.core.scaling.demand import GroupDoing

_SERVING = (GroupState.READY, GroupState.DRAINING)


class EngineLoads:
    """The newest answers of each rank.

    A busy rank may miss a probe: its last answer then stands, so that its group does not look idle.
    """

    def __init__(self) -> None:
        self._ranks: dict[str, dict[int, Recent[RankInfo]]] = {}

    def saw(self, ranks: Mapping[str, RankInfo | None], answered_at_s: Mapping[str, float]) -> None:
        """Both by base URL."""
        for url, info in ranks.items():
            if info is None:
                continue
            recent = self._ranks.setdefault(info.group, {}).setdefault(info.rank, Recent())
            if recent.last is not None and _began_anew(info, recent.last):
                recent.clear()
            recent.add(answered_at_s[url], info)

    def keep(self, groups: Collection[str]) -> None:
        """Forgets all others."""
        self._ranks = {name: ranks for name, ranks in self._ranks.items() if name in groups}

    def of(self, record: GroupRecord, in_flight: int) -> GroupLoad:
        """Only of a group that serves: what a broken gang did last is no load of today."""
        ranks = [info for recent in self.ranks(record) if (info := recent.last) is not None]
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

    def doing(self, record: GroupRecord, latency: Latency) -> GroupDoing | None:
        """None until every rank has answered twice since it started."""
        recents = self.ranks(record)
        spans = [span for recent in recents if (span := recent.span()) is not None]
        if len(spans) < record.spec.parallelism.data:
            return None
        ranks = [last for _, _, last in spans]
        return GroupDoing(
            at_s=min(at_s for recent in recents if (at_s := recent.last_at_s) is not None),
            span_s=round(min(span_s for span_s, _, _ in spans), 3),
            running=sum(info.running for info in ranks),
            waiting=sum(info.waiting for info in ranks),
            kv_usage=round(sum(info.kv_usage for info in ranks) / len(ranks), 4),
            uncached_prompt_tokens_per_s=sum(
                rate(first.uncached_prompt_tokens_total, last.uncached_prompt_tokens_total, span_s)
                for span_s, first, last in spans
            ),
            output_tokens_per_s=sum(
                rate(first.output_tokens_total, last.output_tokens_total, span_s)
                for span_s, first, last in spans
            ),
            ttft_s=latency.ttft_s,
            tpot_s=latency.tpot_s,
        )

    def ranks(self, record: GroupRecord) -> list[Recent[RankInfo]]:
        """Of the ranks of a group that serves, by index."""
        known = self._ranks.get(record.spec.name, {}) if record.state in _SERVING else {}
        world = record.spec.parallelism.data
        return [recent for index, recent in sorted(known.items()) if index < world]


def _began_anew(info: RankInfo, known: RankInfo) -> bool:
    return (
        info.started_at_s != known.started_at_s
        or info.uncached_prompt_tokens_total < known.uncached_prompt_tokens_total
        or info.output_tokens_total < known.output_tokens_total
    )


def group_loads(
    records: Iterable[GroupRecord], engines: EngineLoads, in_flight: Mapping[str, int]
) -> dict[str, GroupLoad]:
    return {
        record.spec.name: engines.of(record, in_flight.get(record.spec.name, 0))
        for record in records
    }


def groups_doing(
    records: Iterable[GroupRecord], engines: EngineLoads, latencies: Mapping[str, Latency]
) -> dict[str, GroupDoing]:
    """By group; those of which it is known."""
    doing = {
        record.spec.name: engines.doing(record, latencies.get(record.spec.name, NO_LATENCY))
        for record in records
    }
    return {name: what for name, what in doing.items() if what is not None}
