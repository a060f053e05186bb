"""A fixed number of groups: what there is without a policy."""

from dataclasses import dataclass

from expertmesh.simulator.baselines.replicas import moves_to, usual_option
from expertmesh.simulator.policy import Move, View
from expertmesh.simulator.scenario import Scenario


@dataclass(slots=True)
class Static:
    """Groups that are lost are started again."""

    scenario: Scenario
    groups: int
    option: int | None = None
    """Index; None: the cheapest for its output."""
    name: str = "static"

    def decide(self, view: View) -> tuple[Move, ...]:
        option = usual_option(self.scenario) if self.option is None else self.option
        return moves_to(view, option, self.groups)
