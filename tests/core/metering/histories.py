"""Random histories of groups and nodes for property tests."""

from hypothesis import strategies as st
from tests.store.records import NOON_S, capacity_hold, node_hold

from expertmesh.core.metering.capacity import WHOLE_POOL, CapacityHold, NodeHold

HOUR_S = 3600

_POOLS = ("cpu", "spot")
_moments_s = st.floats(min_value=0, max_value=HOUR_S).map(lambda s: NOON_S + round(s, 6))
# Prices as people write them, shares that do not come out even, and absurd ones.
_prices = st.one_of(
    st.sampled_from((0.0, 0.3, 1.0, 98.32, 1 / 3, 2 / 3, 5 / 6)),
    st.floats(min_value=0, max_value=1000),
)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[CapacityHold], list[NodeHold]]:
    holds, nodes = [], []
    for pool in _POOLS:
        for number in range(draw(st.integers(min_value=0, max_value=3))):
            for start_s, end_s in _spans(draw):
                ready, draining = draw(st.none() | _moments_s), draw(st.none() | _moments_s)
                rates = draw(st.none() | st.tuples(_rates, _rates))
                holds.append(
                    capacity_hold(
                        f"{pool}-{number}",
                        start_s,
                        end_s,
                        draw(st.sampled_from((None, end_s))),
                        pool=pool,
                        usd_per_hour=draw(_prices),
                        start_s=None if ready is None else max(0.0, ready - start_s),
                        draining_at_s=draining,
                        tokens_per_s=rates,
                    )
                )
        for name in (WHOLE_POOL, "n1", "n2"):
            price = 0.0 if name == WHOLE_POOL else draw(_prices)
            nodes += [
                node_hold(name, start_s, end_s, pool=pool, usd_per_hour=price)
                for start_s, end_s in _spans(draw)
            ]
    return holds, nodes


_rates = st.floats(min_value=0.1, max_value=1e6)


def _spans(draw: st.DrawFn) -> list[tuple[float, float]]:
    """Up to two, side by side."""
    edges = sorted(draw(st.lists(_moments_s, max_size=4)))
    return list(zip(edges[::2], edges[1::2], strict=False))
