"""The scenario file of a simulation: options with their true service times, targets and mishaps."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from expertmesh.core.domain.hardware import Market
from expertmesh.errors import ManifestError
from expertmesh.spec.deployment import Budget, ParallelismManifest, Seconds, SloManifest, Usd
from expertmesh.spec.manifest import ManifestModel, explain, refuse
from expertmesh.spec.platform import Name

KIND = "Scenario"

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=1)]


class RequestManifest(ManifestModel):
    """The request for which the policies are told a group's rates."""

    prompt_tokens: _Positive
    """Without what is in the prefix cache."""
    output_tokens: _Positive


class ServiceManifest(ManifestModel):
    """An iteration with b sequences that decode at a mean context of L tokens, and P prompt tokens,
    takes alpha_s + beta_s * (b + P) + gamma_s * b * L."""

    alpha_s: Seconds
    beta_s: _Positive
    gamma_s: Seconds
    prompt_s: Seconds | None = None
    """A prompt token, in place of beta_s."""
    kv_tokens: _Count
    max_seqs: _Count
    max_batched_tokens: _Count


class StartManifest(ManifestModel):
    median_s: Seconds
    """Of one node."""
    sigma: Seconds = 0.15
    failure_probability: _Share = 0.0
    told_s: Seconds | None = None
    """What the policies are told; by default the median."""


class RatesManifest(ManifestModel):
    """What the policies are told of one group."""

    in_flight: _Positive
    prefill_tokens_per_s: _Positive
    decode_tokens_per_s: _Positive


class ZoneManifest(ManifestModel):
    """Nodes of a spot zone over time: steps, or as generated from the scenario's seed."""

    at_s: tuple[Seconds, ...] = ()
    nodes: tuple[Annotated[int, Field(ge=0)], ...] = ()
    generated_hours: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """In place of the steps: losses as in public spot traces, for so long."""
    notice_s: Seconds = 120.0

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.generated_hours is not None:
            if self.at_s or self.nodes:
                raise ValueError("has steps and generated_hours; write one of them")
            return self
        if len(self.at_s) != len(self.nodes) or not self.at_s:
            raise ValueError(
                f"has {len(self.at_s)} times and {len(self.nodes)} counts of nodes; write as many "
                "of each, at least one, or generated_hours"
            )
        if self.at_s[0] != 0 or any(a >= b for a, b in zip(self.at_s, self.at_s[1:], strict=False)):
            raise ValueError("at_s must begin with 0 and grow")
        return self


class OptionManifest(ManifestModel):
    pool: Name
    market: Market
    parallelism: ParallelismManifest
    nodes: _Count
    """Of one group."""
    max_groups: _Count
    initial_groups: Annotated[int, Field(ge=0)] = 0
    """Ready at the start."""
    usd_per_hour: Usd
    """Of one group."""
    start: StartManifest
    service: ServiceManifest
    rates: RatesManifest | None = None
    """By default those of the service times for the typical request, times `plan_error`."""
    plan_error: _Positive = 1.0
    """1.1: the policies are told 10 % more than groups really do."""
    availability: ZoneManifest | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.market is Market.EXTERNAL:
            raise ValueError("an external pool holds no groups; leave it out")
        if self.initial_groups > self.max_groups:
            raise ValueError(
                f"initial_groups {self.initial_groups} is above max_groups {self.max_groups}"
            )
        if self.availability is not None and self.market is not Market.SPOT:
            raise ValueError("availability is for market: spot; write that, or remove this key")
        if self.rates is not None and self.plan_error != 1.0:
            raise ValueError("rates are what the policies are told; remove plan_error")
        return self


class ScenarioManifest(ManifestModel):
    kind: Literal["Scenario"]
    name: Name
    options: Annotated[tuple[OptionManifest, ...], Field(min_length=1)]
    typical_request: RequestManifest
    slo: SloManifest = SloManifest()
    max_wait_s: Seconds = 30.0
    """A request that has waited this long for a group is refused."""
    min_groups: Annotated[int, Field(ge=0)] = 0
    budget: Budget | None = None
    tick_s: _Positive = 10.0
    metric_delay_s: Seconds = 5.0
    drain_deadline_s: Seconds = 600.0
    seed: Annotated[int, Field(ge=0)] = 1
    output_cv2: _NotNegative = 1.0
    """Variance of the output lengths over the square of their mean."""

    @model_validator(mode="after")
    def _room(self) -> Self:
        most = sum(option.max_groups for option in self.options)
        if self.min_groups > most:
            raise ValueError(f"min_groups {self.min_groups} is above the options' {most} groups")
        return self


def read_scenario(file: Path) -> ScenarioManifest:
    """The one document of the file. Raises ManifestError, with one line per problem."""
    name = str(file)
    try:
        documents = list(yaml.safe_load_all(file.read_text()))
    except FileNotFoundError:
        raise ManifestError(f"{file}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ManifestError(f"{file}: is no YAML: {' '.join(str(error).split())}") from None
    documents = [document for document in documents if document is not None]
    if len(documents) != 1:
        raise ManifestError(
            f"{file}: holds {len(documents)} documents; write one with kind: {KIND}"
        )
    return _validate(name, documents[0])


def _validate(name: str, document: Any) -> ScenarioManifest:
    if not isinstance(document, dict):
        raise ManifestError(
            f"{name}: holds a {type(document).__name__}; write a mapping with kind: {KIND}"
        )
    kind = document.get("kind")
    if kind in ("ModelDeployment", "Platform"):
        raise refuse(
            name,
            "kind",
            kind,
            "holds no measured service times, and a policy must not be graded by the planner's "
            f"estimates; write a {KIND}, for example as benchmarks/scenarios/r1-ep16.yaml",
        )
    if kind != KIND:
        raise refuse(name, "kind", kind, f"unknown; write {KIND}")
    try:
        return ScenarioManifest.model_validate(document)
    except ValidationError as error:
        raise explain(name, ScenarioManifest, error) from None
