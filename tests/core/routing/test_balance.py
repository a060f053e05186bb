"""Affinity under skewed popularity: few ranks hold what is popular, none becomes a hot spot.

A fleet of 16 ranks that always has 128 requests under way. What is asked for follows Zipf's law:
the most popular of 2,000 sessions or prompts makes up an eighth of the traffic, which is more than
any rank may have.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from tests.core.routing.fleets import group, router

from expertmesh.core.routing.candidate import Candidate
from expertmesh.core.routing.prefix import prefix_blocks
from expertmesh.core.routing.router import Router, RoutingConfig
from expertmesh.core.routing.work import Sent

RANKS, IN_FLIGHT, REQUESTS, KEYS = 16, 128, 12_000, 2_000
CACHED_KEYS = KEYS // RANKS
"""That a rank holds: all ranks together could hold each key once."""
MEAN = IN_FLIGHT / RANKS
CONFIG = RoutingConfig()
# At the choice a rank has at most the bound; the request comes on top of it.
MOST = CONFIG.balance * MEAN + CONFIG.slack_requests + 1
PROMPTS = [prefix_blocks(b"%08d" % n * 256) for n in range(KEYS)]

Choose = Callable[[Router, int], Candidate | None]


@dataclass(frozen=True)
class Result:
    most: int
    """Requests on one rank at once."""
    hits: float

    def __str__(self) -> str:
        return (
            f"at most {self.most} on a rank (mean {MEAN:.0f}, ratio {self.most / MEAN:.2f}), "
            f"{self.hits:.1%} hits"
        )


def simulate(choose: Choose, oldest_first: bool) -> Result:
    """Requests end in the order of their start, or in any order."""
    chance = random.Random(7)
    made = router(*(group(name, 4) for name in "abcd"), config=CONFIG)
    weights = list(accumulate(1 / (n + 1) for n in range(KEYS)))
    keys = chance.choices(range(KEYS), cum_weights=weights, k=REQUESTS)
    caches: dict[str, OrderedDict[int, None]] = {}
    under_way: deque[Sent] = deque()
    most = hits = 0
    for key in keys:
        if len(under_way) == IN_FLIGHT:
            if not oldest_first:
                under_way.rotate(chance.randrange(IN_FLIGHT))
            made.end(under_way.popleft(), 0.0)
        candidate = choose(made, key)
        assert candidate is not None
        cache = caches.setdefault(candidate.base_url, OrderedDict())
        hits += key in cache
        cache[key] = None
        cache.move_to_end(key)
        if len(cache) > CACHED_KEYS:
            cache.popitem(last=False)
        sent = made.begin(candidate)
        under_way.append(sent)
        most = max(most, sent.rank.in_flight)
    return Result(most, hits / REQUESTS)


def by_session(made: Router, key: int) -> Candidate | None:
    return made.choose("m", (), b"session-%d" % key)


def by_prefix(made: Router, key: int) -> Candidate | None:
    return made.choose("m", (), None, PROMPTS[key])


def least_loaded(made: Router, _: int) -> Candidate | None:
    return made.choose("m")


def without_bound(made: Router, key: int) -> Candidate | None:
    """What affinity alone would do."""
    ranks = made._tables["m"].ranks
    return ranks[key % len(ranks)].candidate


def test_affinity_hits_far_more_often_than_chance_and_makes_no_hot_spot() -> None:
    for oldest_first in (True, False):
        plain = simulate(least_loaded, oldest_first)
        hot = simulate(without_bound, oldest_first)
        sessions = simulate(by_session, oldest_first)
        prefixes = simulate(by_prefix, oldest_first)
        figures = (
            f"oldest first {oldest_first}: least loaded {plain}; affinity without bound {hot}; "
            f"sessions {sessions}; prefixes {prefixes}; bound {MOST:.0f}"
        )
        assert hot.most > 1.5 * MOST, f"the traffic is not skewed enough to show it: {figures}"
        assert sessions.most <= MOST and prefixes.most <= MOST, figures
        assert min(sessions.hits, prefixes.hits) > plain.hits + 0.2, figures
