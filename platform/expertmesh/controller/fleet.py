"""The fleet as gateways get it: built from the groups' records after every decision."""

from collections.abc import Iterable, Mapping

from expertmesh.core.domain.fleet import Fleet, Group, ServedModel
from expertmesh.core.scaling.contract import GroupRecord, ModelState


class FleetBoard:
    """Holds the newest fleet; nothing is shown before the first decision."""

    def __init__(self, models: Iterable[ServedModel], first_version: int) -> None:
        """`first_version` must be above that of any earlier controller: versions only grow."""
        self._models = tuple(models)
        self._version = first_version
        self._fleet: Fleet | None = None
        self.as_of_s = 0.0
        """The decision that the fleet shows was made at this time."""

    @property
    def fleet(self) -> Fleet | None:
        return self._fleet

    def show(self, states: Mapping[str, ModelState], now_s: float) -> None:
        groups = tuple(
            sorted(
                (_group(record) for state in states.values() for record in state.groups),
                key=lambda group: group.name,
            )
        )
        if self._fleet is None or self._fleet.groups != groups:
            self._version += 1
            self._fleet = Fleet(version=self._version, models=self._models, groups=groups)
        self.as_of_s = now_s


def _group(record: GroupRecord) -> Group:
    spec = record.spec
    return Group(
        name=spec.name,
        model=spec.model,
        pool=spec.pool,
        state=record.state,
        ranks=record.ranks,
        world_size=spec.parallelism.data,
        usd_per_hour=spec.usd_per_hour,
        expected_ready_at_s=record.expected_ready_at_s,
        message=record.message,
    )
