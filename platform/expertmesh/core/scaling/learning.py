"""What groups really do, read off their speed; the plan's figures are where it begins.

With b requests in its batch a group takes `t = t0 + s * b` for an iteration, t0 that of a request
alone. So from b and t of now follows the batch at which t reaches the target, and with it what the
group can do with the requests of now: longer contexts, which no plan foresees, are in s. A group
that is nearly idle, young, or not heard of teaches nothing, unless it is quicker than was believed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from expertmesh.core.domain.option import GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.core.scaling.demand import GroupDoing
from expertmesh.core.scaling.work import Work

_LEARN_S = 120.0
"""Time constant of what is learned: contexts change within minutes."""
_OWN_S = 3600.0
"""Of what sets one option apart from the others."""
_TELLING = 0.1
"""Of the way from t0 to the target, from which an iteration's time tells something."""
_RATIOS = (0.2, 5.0)
"""Of a planned figure: beyond it the plan is of something else."""
_KV_SHARE = 0.9
"""Of the cache that can be filled without preemptions."""
_DECODES = 32.0
"""Output tokens a request, from which a group mostly decodes, so that the requests in its batch
over its tokens a second are the time of an iteration."""
_STANDSTILL = 1e3
"""Of the target: a time per token above it tells nothing of a group that works."""
_MANY = 0.25
"""Of the requests that a group should carry, from which counting them at one moment says enough."""


@dataclass(frozen=True, slots=True)
class Learned:
    """Of one option."""

    seconds_ratio: float = 1.0
    """Time of a group that a request takes, over the planned time."""
    own_ratio: float = 1.0
    """The part of it that the model's other options do not share, over a longer time."""
    seconds: float | None = None
    """The same itself, where nothing is planned: for a mean request of the last minutes."""
    lone_tpot_s: float | None = None
    """The shortest time per output token that was seen, where nothing is planned."""
    measured_s: float = 0.0
    """Groups' time that it rests on."""
    at_s: float | None = None
    """When it was last measured; None: it does not fade."""

    def share(self, now_s: float | None) -> float:
        """Of it that has not faded."""
        if now_s is None or self.at_s is None:
            return 1.0
        return math.exp(-max(0.0, now_s - self.at_s) / _OWN_S)


@dataclass(frozen=True, slots=True)
class Speed:
    """A group at work."""

    use: float
    """Share of what it can do at the targets; above 1 it misses them."""
    seconds: float
    """Of its time that a request takes when it is full."""


def speed_of(
    doing: GroupDoing, rates: GroupRates, lone_tpot_s: float | None, work: Work, slo: Slo
) -> Speed | None:
    """None when its speed tells nothing."""
    if lone_tpot_s is None or lone_tpot_s >= slo.tpot_s or not work.is_known:
        return None
    tpot_s = tpot_now_s(doing, rates, work)
    if tpot_s is None or tpot_s > _STANDSTILL * slo.tpot_s or doing.running < 1:
        return None
    grown = (tpot_s - lone_tpot_s) / (slo.tpot_s - lone_tpot_s)
    if grown < _TELLING:
        return None
    batch = doing.running / grown
    if doing.kv_usage > 0.05:
        batch = min(batch, doing.running * _KV_SHARE / doing.kv_usage)
    batch = max(1.0, min(batch, rates.in_flight))
    full_tpot_s = lone_tpot_s + (tpot_s - lone_tpot_s) * batch / doing.running
    use = (doing.running / tpot_s) / (batch / full_tpot_s)
    return Speed(use, max(1.0, work.output_tokens) * full_tpot_s / batch)


def most_seconds(
    doing: GroupDoing, rates: GroupRates, lone_tpot_s: float | None, work: Work, slo: Slo
) -> float | None:
    """Of a group's time, that a request can take at most: of a group that answers all that it has
    nearly as quickly as one request alone. None: it tells nothing."""
    if lone_tpot_s is None or lone_tpot_s >= slo.tpot_s or not work.is_known:
        return None
    tpot_s = tpot_now_s(doing, rates, work)
    if tpot_s is None or doing.running < 1:
        return None
    if tpot_s - lone_tpot_s >= _TELLING * (slo.tpot_s - lone_tpot_s):
        return None
    batch = doing.running / _TELLING
    if doing.kv_usage > 0.05:
        batch = min(batch, doing.running * _KV_SHARE / doing.kv_usage)
    batch = max(1.0, min(batch, rates.in_flight))
    return max(1.0, work.output_tokens) * slo.tpot_s / batch


def tpot_now_s(doing: GroupDoing, rates: GroupRates, work: Work) -> float | None:
    """Time between two tokens of an answer, as young as it can be had."""
    many = doing.running >= _MANY * rates.in_flight
    decodes = work.output_tokens >= _DECODES and doing.output_tokens_per_s > 0
    if decodes and (many or doing.tpot_s is None):
        return doing.running / doing.output_tokens_per_s
    return doing.tpot_s


def learn(
    known: Learned | None,
    planned: GroupRates,
    doing: GroupDoing,
    work: Work,
    slo: Slo,
    over_s: float,
    usual_ratio: float,
) -> Learned | None:
    """From one group's last figures; `over_s` is the time since the last look at it, and
    `usual_ratio` is that of all options."""
    before = known or Learned()
    lone_tpot_s = planned.lone_tpot_s or before.lone_tpot_s
    if planned.lone_tpot_s is None and doing.tpot_s is not None:
        lone_tpot_s = min(doing.tpot_s, lone_tpot_s or doing.tpot_s)
    planned_s = planned.seconds(work.prompt_tokens, work.output_tokens)
    speed = speed_of(doing, planned, lone_tpot_s, work, slo)
    found_s = speed.seconds if speed is not None else None
    if speed is None:
        # What was learned while something else slowed the group is refuted by its being quick.
        most_s = most_seconds(doing, planned, lone_tpot_s, work, slo)
        believed_s = planned_s * before.seconds_ratio if planned_s else before.seconds
        if most_s is not None and believed_s is not None and most_s < believed_s:
            found_s = most_s
    if found_s is None or over_s <= 0:
        if lone_tpot_s == before.lone_tpot_s or planned.lone_tpot_s is not None:
            return known
        return replace(before, lone_tpot_s=lone_tpot_s)
    share = 1.0 - math.exp(-over_s / min(_LEARN_S, before.measured_s + over_s))
    ratio, own, seconds = before.seconds_ratio, before.own_ratio, before.seconds
    if planned_s:
        told = min(_RATIOS[1], max(_RATIOS[0], found_s / planned_s))
        ratio += share * (told - ratio)
        own += (1.0 - math.exp(-over_s / _OWN_S)) * (told / usual_ratio - own)
    else:
        seconds = found_s if seconds is None else seconds + share * (found_s - seconds)
    return Learned(ratio, own, seconds, lone_tpot_s, before.measured_s + over_s, doing.at_s)


def usual_ratio(learned: Iterable[Learned], now_s: float | None = None) -> float:
    """Of all options together: what slows one of them, such as long contexts, slows all. What was
    measured long ago counts less, and where all of it is old, the plan counts again."""
    known = [
        (each.seconds_ratio / each.own_ratio, min(each.measured_s, _LEARN_S), each.share(now_s))
        for each in learned
        if each.measured_s > 0
    ]
    weight = sum(measured_s * share for _, measured_s, share in known)
    if weight <= 0:
        return 1.0
    mean = sum(ratio * measured_s * share for ratio, measured_s, share in known) / weight
    return 1.0 + max(share for _, _, share in known) * (mean - 1.0)
