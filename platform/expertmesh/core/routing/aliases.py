"""Which model a client means by a name."""

from expertmesh.core.domain.fleet import Fleet, ServedModel


def models_by_name(fleet: Fleet) -> dict[str, ServedModel]:
    """By name and by alias. A name wins over an alias; of two models with the same alias the first
    of the fleet wins."""
    table: dict[str, ServedModel] = {}
    for model in fleet.models:
        for alias in model.aliases:
            table.setdefault(alias, model)
    table.update((model.name, model) for model in fleet.models)
    return table
