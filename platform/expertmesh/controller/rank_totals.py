"""What ranks have done since the last look: they tell totals, which begin anew with a process."""

from collections.abc import Collection
from dataclasses import dataclass

from expertmesh.core.domain.fleet import RankInfo


@dataclass(frozen=True, slots=True)
class Grown:
    expert_tokens: dict[str, int]
    prompt_tokens: int
    """Computed; those from the cache are apart."""
    cached_tokens: int
    output_tokens: int
    preemptions: int


class RankTotals:
    def __init__(self) -> None:
        self._last: dict[tuple[str, int], RankInfo] = {}

    def grown(self, info: RankInfo) -> Grown:
        key = (info.group, info.rank)
        before = self._last.get(key)
        self._last[key] = info
        if before is None or _began_anew(info, before):
            return Grown(
                dict(info.expert_tokens),
                info.uncached_prompt_tokens_total,
                info.cached_prompt_tokens_total,
                info.output_tokens_total,
                info.preemptions_total,
            )
        # Ranks read their experts every few seconds: most looks show nothing new of them.
        same = info.expert_tokens == before.expert_tokens
        return Grown(
            {}
            if same
            else {
                expert: tokens - before.expert_tokens.get(expert, 0)
                for expert, tokens in info.expert_tokens.items()
            },
            info.uncached_prompt_tokens_total - before.uncached_prompt_tokens_total,
            info.cached_prompt_tokens_total - before.cached_prompt_tokens_total,
            info.output_tokens_total - before.output_tokens_total,
            info.preemptions_total - before.preemptions_total,
        )

    def keep(self, groups: Collection[str]) -> None:
        """Forgets all others."""
        self._last = {key: info for key, info in self._last.items() if key[0] in groups}


def _began_anew(info: RankInfo, before: RankInfo) -> bool:
    return (
        info.started_at_s != before.started_at_s
        or info.uncached_prompt_tokens_total < before.uncached_prompt_tokens_total
        or info.cached_prompt_tokens_total < before.cached_prompt_tokens_total
        or info.output_tokens_total < before.output_tokens_total
        or info.preemptions_total < before.preemptions_total
        or any(
            tokens < before.expert_tokens.get(expert, 0)
            for expert, tokens in info.expert_tokens.items()
        )
    )
