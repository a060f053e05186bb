"""Scaling policies of a simulation by name, with their parameters as text."""

import importlib
import importlib.util
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

from expertmesh.errors import SetupError
from expertmesh.simulator.baselines.dynamo import Dynamo
from expertmesh.simulator.baselines.keda import Keda
from expertmesh.simulator.baselines.knative import Knative
from expertmesh.simulator.baselines.replicas import usual_option
from expertmesh.simulator.baselines.skyserve import SkyServe
from expertmesh.simulator.baselines.static import Static
from expertmesh.simulator.baselines.wva_v1 import WvaV1
from expertmesh.simulator.baselines.wva_v2 import WvaV2
from expertmesh.simulator.oracle import problem, static_peaks
from expertmesh.simulator.policy import PolicyMaker, ScalingPolicy
from expertmesh.simulator.scenario import Scenario
from expertmesh.simulator.workload import Load

OWN = "expertmesh"
RAY_SERVE = "ray-serve"
_OWN_CLASS = ("expertmesh.simulator.core_policy", "CorePolicy")
# Loaded only when it is asked for: Ray takes more than a second, and may not be installed.
_RAY_CLASS = ("expertmesh.launch.ray_serve_policy", "RayServe")

_BASELINES: Mapping[str, tuple[type[Any], Mapping[str, Any]]] = types.MappingProxyType(
    {
        "static": (Static, {}),
        "keda-waiting": (Keda, {"name": "keda-waiting"}),
        "keda-running": (
            Keda,
            {"name": "keda-running", "count_running": True, "threshold": 2.0},
        ),
        "knative": (Knative, {}),
        "wva-v1": (WvaV1, {}),
        "wva-v2": (WvaV2, {}),
        "dynamo": (Dynamo, {}),
        "skyserve": (SkyServe, {}),
    }
)


def policy_names() -> tuple[str, ...]:
    """Those that can run here."""
    own = (OWN,) if importlib.util.find_spec(_OWN_CLASS[0]) else ()
    ray = (RAY_SERVE,) if importlib.util.find_spec("ray") else ()
    return (*own, *_BASELINES, *ray)


def read_policy(text: str) -> PolicyMaker:
    """`name` or `name:parameter=value,…`, for example `static:groups=12`.

    Raises SetupError, which names what is known.
    """
    name, _, rest = text.partition(":")
    given: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise SetupError(f"policy {text!r}: {part!r}: write parameter=value")
        given[key.strip()] = value.strip()
    return policy_maker(name.strip(), given)


def without_gaps(text: str, scenario: Scenario, load: Load) -> str:
    """The same, where `static` and `skyserve` get what has no default from the load: as many
    groups as its peak needs, and a group's planned rate for its mean request.

    Raises SetupError when no number of groups is enough.
    """
    if text == "static":
        option = usual_option(scenario)
        peak = static_peaks(problem(scenario, load))[option]
        if peak is None:
            name = scenario.options[option].option.name
            raise SetupError(
                f"policy static: {scenario.options[option].max_groups} groups of {name} cannot "
                "serve the peak; raise max_groups, or write static:groups=…"
            )
        return f"static:groups={peak[1]}"
    if text == "skyserve":
        requests = max(float(load.requests.sum()), 1.0)
        rates = scenario.options[usual_option(scenario)].option.rates
        seconds = rates.seconds(
            float(load.prompt_tokens.sum()) / requests, float(load.output_tokens.sum()) / requests
        )
        return f"skyserve:requests_per_s={1.0 / seconds:.4g}" if seconds else text
    return text


def policy_maker(name: str, given: Mapping[str, str]) -> PolicyMaker:
    """The published defaults hold for what is not given. Raises SetupError."""
    kind, defaults = _kind(name)
    hints = get_type_hints(kind)
    known = _parameters(kind)
    values = dict(defaults)
    for key, text in given.items():
        if key not in known:
            raise SetupError(
                f"policy {name}: {key!r}: no such parameter; "
                f"it has {', '.join(known) or 'no parameters'}"
            )
        values[key] = _value(name, key, text, hints[key])
    missing = [key for key, field in known.items() if key not in values and _is_needed(field)]
    if missing:
        wanted = ",".join(f"{key}=…" for key in missing)
        raise SetupError(f"policy {name}: {missing[0]} has no default; write {name}:{wanted}")
    make: Callable[..., ScalingPolicy] = kind
    return partial(make, **values)


def _kind(name: str) -> tuple[type[Any], Mapping[str, Any]]:
    if name in _BASELINES:
        return _BASELINES[name]
    if name not in policy_names():
        raise SetupError(f"policy {name!r}: unknown; known are {', '.join(policy_names())}")
    module, attribute = _OWN_CLASS if name == OWN else _RAY_CLASS
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found, {}


def _parameters(kind: type[Any]) -> dict[str, Field[Any]]:
    try:
        all_fields = fields(kind)
    except TypeError:
        return {}
    return {
        field.name: field
        for field in all_fields
        if field.init and field.name not in ("scenario", "name") and field.name[0] != "_"
    }


def _is_needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _value(policy: str, key: str, text: str, hint: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind is bool:
        if text not in ("true", "false"):
            raise SetupError(f"policy {policy}: {key}: {text!r}: write true or false")
        return text == "true"
    read: Callable[[str], Any] = kind
    try:
        return read(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        if issubclass(kind, Enum):
            what = f"one of {', '.join(str(member.value) for member in kind)}"
        raise SetupError(f"policy {policy}: {key}: {text!r}: write {what}") from None
