"""Spot zones over time, drawn so that they lose nodes as the zones of public spot traces do.

The public traces (SkyPilot's, AWS V100 and K80 of 2022-23) may not be passed on; their facts are:
a zone holds 8 wanted nodes about half of the time; it keeps them for another hour with probability
0.3 when it has had them for at most half an hour, and 0.9 from two hours on; most losses take at
least half of the nodes at once.
"""

import random

from expertmesh.simulator.scenario import Availability

_SHORT_SHARE = 0.817
"""Of the times with nodes; they last 20 min in the mean, the others 12 h. From that follow 0.32 for
young nodes and 0.91 for old ones."""
_SHORT_S = 1200.0
_LONG_S = 43200.0
_AWAY_S = 8900.0
"""Mean time without nodes: as long as the mean time with them."""
_WHOLE_ZONE = 0.7
"""Of the losses take every node; the others take up to half, for `_DENT_S` in the mean."""
_DENT_S = 3600.0
_SHORTEST_S = 60.0


def spot_zone(nodes: int, duration_s: float, seed: str, notice_s: float = 120.0) -> Availability:
    """`nodes` are as many as it has at most; the same seed gives the same zone."""
    draw = random.Random(seed)
    at_s, counts = [0.0], [nodes if draw.random() < 0.5 else 0]
    now_s = 0.0
    while True:
        if counts[-1] == 0:
            now_s += _span(draw, _AWAY_S)
            after = nodes
        elif counts[-1] < nodes:
            now_s += _span(draw, _DENT_S)
            after = nodes
        else:
            short = draw.random() < _SHORT_SHARE
            now_s += _span(draw, _SHORT_S if short else _LONG_S)
            dent = nodes > 1 and draw.random() >= _WHOLE_ZONE
            after = nodes - draw.randint(1, nodes // 2) if dent else 0
        if now_s >= duration_s:
            return Availability(tuple(at_s), tuple(counts), notice_s)
        at_s.append(now_s)
        counts.append(after)


def _span(draw: random.Random, mean_s: float) -> float:
    return max(_SHORTEST_S, draw.expovariate(1.0 / mean_s))
