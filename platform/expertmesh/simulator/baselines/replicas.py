"""What the baselines share: they count replicas of one option and ask for another number."""

from collections.abc import Iterable

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.domain.hardware import Market
from expertmesh.simulator.policy import Drain, GroupView, Move, Start, View
from expertmesh.simulator.scenario import Scenario, SimulatedOption


def usual_option(scenario: Scenario) -> int:
    """For a policy that knows one kind of replica: the cheapest for its output, on demand where
    there is such a one."""

    def usd_for_output(option: SimulatedOption) -> float:
        rates = option.option.rates
        return option.option.usd_per_hour / (rates.decode_tokens_per_s or rates.in_flight)

    options = range(len(scenario.options))
    steady = [i for i in options if scenario.options[i].market is not Market.SPOT]
    return min(steady or options, key=lambda i: (usd_for_output(scenario.options[i]), i))


def replicas_of(view: View, option: int) -> list[GroupView]:
    """Those that serve or will."""
    return [
        group
        for group in view.groups
        if group.option == option and group.state in (GroupState.STARTING, GroupState.READY)
    ]


def ready(groups: Iterable[GroupView]) -> list[GroupView]:
    return [group for group in groups if group.state is GroupState.READY]


def waiting_requests(view: View) -> float:
    """In the engines and before them: without a gateway that holds requests they would all wait
    in the engines."""
    return view.queued + sum(group.waiting for group in view.groups)


def running_requests(view: View) -> float:
    return sum(group.in_flight - group.waiting for group in view.groups)


def first_to_leave(groups: Iterable[GroupView]) -> list[GroupView]:
    """Those that do not serve yet, then the youngest: as Kubernetes, Ray and SkyPilot do."""
    return sorted(
        groups, key=lambda group: (group.state is GroupState.READY, -group.requested_at_s)
    )


def moves_to(view: View, option: int, wanted: int) -> tuple[Move, ...]:
    """None of the baselines calls a draining replica back."""
    have = replicas_of(view, option)
    if wanted > len(have):
        return (Start(option),) * min(wanted - len(have), view.room[option])
    leaving = first_to_leave(have)[: len(have) - max(0, wanted)]
    return tuple(Drain(group.name) for group in leaving)
