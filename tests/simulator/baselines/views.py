"""Views and scenarios made by hand."""

from collections.abc import Sequence

from expertmesh.core.domain.fleet import GroupState, Parallelism
from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.policy import Drain, GroupView, Move, Start, View
from expertmesh.simulator.scenario import Scenario, SimulatedOption, StartTime
from expertmesh.simulator.service_time import ServiceTime


def option(
    pool: str = "od",
    usd_per_hour: float = 10.0,
    market: Market = Market.ON_DEMAND,
    max_groups: int = 100,
    in_flight: float = 100.0,
    prefill_tokens_per_s: float = 10_000.0,
    decode_tokens_per_s: float = 1_000.0,
    kv_tokens: int = 100_000,
    max_seqs: int = 100,
    max_batched_tokens: int = 1_000,
) -> SimulatedOption:
    return SimulatedOption(
        option=GroupOption(
            pool=pool,
            parallelism=Parallelism(1, 8, 8),
            usd_per_hour=usd_per_hour,
            rates=GroupRates(in_flight, prefill_tokens_per_s, decode_tokens_per_s),
            start_s=300.0,
        ),
        service=ServiceTime(0.02, 1e-5, 1e-8, kv_tokens, max_seqs, max_batched_tokens),
        start=StartTime(300.0),
        nodes=1,
        market=market,
        max_groups=max_groups,
    )


def scenario(*options: SimulatedOption, min_groups: int = 0) -> Scenario:
    return Scenario(
        name="made",
        options=options or (option(),),
        slo=Slo(ttft_s=2.0, tpot_s=0.05),
        max_wait_s=30.0,
        min_groups=min_groups,
    )


def group(
    number: int,
    option: int = 0,
    state: GroupState = GroupState.READY,
    in_flight: float = 0.0,
    waiting: float = 0.0,
    kv_usage: float = 0.0,
    prompt_tokens_per_s: float = 0.0,
    output_tokens_per_s: float = 0.0,
) -> GroupView:
    return GroupView(
        name=f"g{number}",
        option=option,
        state=state,
        since_s=float(number),
        requested_at_s=float(number),
        in_flight=in_flight,
        waiting=waiting,
        kv_usage=kv_usage,
        prompt_tokens_per_s=prompt_tokens_per_s,
        output_tokens_per_s=output_tokens_per_s,
    )


def groups(count: int, **each: float) -> tuple[GroupView, ...]:
    return tuple(group(number, **each) for number in range(1, count + 1))  # type: ignore[arg-type]


def view(
    now_s: float = 0.0,
    groups: Sequence[GroupView] = (),
    room: Sequence[int] = (100,),
    queued: float = 0.0,
    arrivals_per_s: float = 0.0,
    prompt_tokens: float = 0.0,
    output_tokens: float = 0.0,
) -> View:
    return View(
        now_s=now_s,
        window_s=10.0,
        groups=tuple(groups),
        room=tuple(room),
        queued=queued,
        arrivals_per_s=arrivals_per_s,
        finished_prompt_tokens=prompt_tokens,
        finished_output_tokens=output_tokens,
    )


def started(moves: Sequence[Move]) -> list[int]:
    """Options of the starts."""
    return [move.option for move in moves if isinstance(move, Start)]


def drained(moves: Sequence[Move]) -> list[str]:
    return [move.group for move in moves if isinstance(move, Drain)]
