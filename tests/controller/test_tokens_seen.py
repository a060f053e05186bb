"""What gateways and ranks tell about tokens reaches the decisions, the journal and the API."""

from tests.controller.fake_serve import RankLoad
from tests.controller.running_system import MODEL, RunningSystem

from expertmesh.core.domain.traffic import GatewayReport, GroupTraffic, ModelTraffic
from expertmesh.core.scaling.contract import GroupSeen, Observation
from expertmesh.core.scaling.demand import Flow, GroupDoing
from expertmesh.core.scaling.replay import read_record, replay

GROUP = "em-tiny-cheap-1"


def report(system: RunningSystem, requests: int) -> GatewayReport:
    """After so many requests: of 100 prompt tokens, 40 of them cached, and 20 output tokens."""
    traffic = ModelTraffic(
        queued_requests=1,
        queued_prompt_tokens=100,
        arrivals_total=requests,
        arrived_prompt_tokens_total=100 * requests,
        finished_total=requests,
        uncached_prompt_tokens_total=60 * requests,
        output_tokens_total=20 * requests,
    )
    counts = GroupTraffic(
        in_flight=3,
        ttft_s_sum=0.5 * requests,
        ttft_count=requests,
        tpot_s_sum=0.02 * requests,
        tpot_count=requests,
    )
    return GatewayReport("g1", system.clock(), models={MODEL: traffic}, groups={GROUP: counts})


async def busy(seconds: int = 15) -> RunningSystem:
    """One group; two requests a second and, by each of its ranks, 60 and 20 tokens."""
    system = RunningSystem()
    await system.pass_s(15)
    system.gateways = []
    for second in range(seconds):
        system.controller.exchange(report(system, 2 * second))
        system.serve.busy = {
            GROUP: RankLoad(2, 1, 0.5, prompt_tokens=60 * second, output_tokens=20 * second)
        }
        await system.pass_s(1)
    return system


def last_observation(system: RunningSystem) -> Observation:
    payloads = [entry.payload for entry in system.journal.entries if entry.kind == "decision"]
    return read_record(payloads[-1]).observation


def group_of(observation: Observation) -> GroupSeen:
    return next(group for group in observation.groups if group.name == GROUP)


async def test_the_api_shows_what_groups_do_and_gateways_take() -> None:
    system = await busy()
    assert system.controller.doing() == {
        GROUP: GroupDoing(
            at_s=system.clock() - 1.0,
            span_s=10.0,
            running=4,
            waiting=2,
            kv_usage=0.55,
            uncached_prompt_tokens_per_s=120.0,
            output_tokens_per_s=40.0,
            ttft_s=0.5,
            tpot_s=0.02,
        )
    }
    assert system.controller.flows() == {MODEL: Flow(10.0, 2.0, 200.0, 2.0, 120.0, 40.0)}


async def test_a_decision_rests_on_them_and_replays() -> None:
    system = await busy(80)
    seen = last_observation(system)
    doing = group_of(seen).doing
    assert doing is not None
    assert (doing.span_s, doing.output_tokens_per_s) == (10.0, 40.0)
    (gateway,) = [gateway for gateway in seen.gateways if gateway.flow is not None]
    assert gateway.flow == Flow(10.0, 2.0, 200.0, 2.0, 120.0, 40.0)
    assert gateway.queued_prompt_tokens == 100
    records = [read_record(e.payload) for e in system.journal.entries if e.kind == "decision"]
    assert all(replay(record).equal for record in records)


async def test_a_gang_that_is_restarted_is_unknown_for_a_while_and_then_counts_anew() -> None:
    system = await busy()
    system.serve.kill_rank(GROUP, 0)
    system.serve.kill_rank(GROUP, 1)
    # More than its predecessor had done: as if it had worked hard before it was seen.
    system.serve.busy = {GROUP: RankLoad(prompt_tokens=1_000_000, output_tokens=1_000_000)}
    known, states = [], []
    for _ in range(60):
        await system.pass_s(1)
        known.append(system.controller.doing().get(GROUP))
        states.append(system.states()[GROUP])
    assert states[-1] == "ready" and "lost" in states
    assert None in known and known[-1] is not None
    assert all(doing.output_tokens_per_s <= 40.0 for doing in known if doing is not None)
    assert known[-1].output_tokens_per_s == 0.0


async def test_a_notice_reaches_the_decision() -> None:
    system = RunningSystem()
    await system.pass_s(15)
    node = system.serve.nodes_of(GROUP)[0]
    taken_at_s = system.clock() + 120
    system.serve.notices = {node: taken_at_s}
    await system.pass_s(65)
    payloads = [entry.payload for entry in system.journal.entries if entry.kind == "decision"]
    seen = [read_record(payload).observation for payload in payloads]
    assert [group.leaving_at_s for o in seen for group in o.groups if group.name == GROUP][
        -1
    ] == taken_at_s
