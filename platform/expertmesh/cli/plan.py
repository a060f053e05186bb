"""`expertmesh plan`: what a model needs in a pool, before a GPU is rented."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from expertmesh.cli.controller import MESH_TOKEN_VARIABLE, read_token
from expertmesh.cli.plan_view import answers_as_json, render
from expertmesh.clients.expert_load import read_expert_load
from expertmesh.clients.hugging_face import hub_file
from expertmesh.core.domain.accelerator import Price
from expertmesh.core.domain.model_shape import Dtype
from expertmesh.core.perf.layout import Layout
from expertmesh.core.planner.balance import ExpertLoad
from expertmesh.core.planner.plan import NoPlan, Plan
from expertmesh.core.planner.question import (
    Checkpoint,
    GpuPool,
    Objective,
    Question,
    Serving,
    Targets,
)
from expertmesh.core.planner.search import search, search_sizes
from expertmesh.errors import ExpertMeshError, ManifestError, SetupError
from expertmesh.spec.catalog_hardware import accelerators
from expertmesh.spec.deployment import DeploymentManifest
from expertmesh.spec.expert_load import expert_load, read_file
from expertmesh.spec.given_parallelism import plan_size
from expertmesh.spec.group_options import kv_format, most_sequences, usual_request
from expertmesh.spec.load import read_manifests
from expertmesh.spec.model_config import load_shape
from expertmesh.spec.planning import catalog_pool, checkpoints_named, platform_pool, unknown_name
from expertmesh.spec.platform import PlatformManifest

USUAL_POOLS = ("H100", "H200", "B200")
USUAL_CONTEXT = 32768
_NOTHING_FITS = 1


class KvFormat(StrEnum):
    BF16 = "bf16"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to plan for, as a manifest or the command line names it."""

    name: str
    checkpoints: tuple[Checkpoint, ...]
    targets: Targets
    pools: tuple[str, ...] = ()
    """That its manifest names."""
    warnings: tuple[str, ...] = ()
    kv: Dtype = Dtype.BF16
    """Of the cache."""
    usd_per_hour: float = inf
    """That a group may cost at most, by the manifest's budget."""
    layouts: tuple[Layout, ...] = ()
    """Sizes of groups that its manifest gives; none with `auto`."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that its manifest gives."""


@dataclass(frozen=True, slots=True)
class Answer:
    subject: Subject
    plan: Plan | NoPlan
    seconds: float
    """That the search took."""
    options: tuple[Plan, ...] = ()
    """Sizes of a group that a controller would be given, the best first."""


def plan(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|MODEL...",
            help="A ModelDeployment manifest, a model's name in the catalogue, a folder, or a "
            "Hugging Face id.",
        ),
    ],
    pools: Annotated[
        list[str] | None,
        typer.Option("--pool", metavar="POOL", help="A pool of the platform file, or a GPU."),
    ] = None,
    platform: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Pools and prices; else the catalogue's.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes of a pool that is only a GPU's name.")
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option("--context", help="Longest sequence, in tokens.")
    ] = None,
    input_tokens: Annotated[
        int | None, typer.Option("--input", help="Tokens of a usual prompt; else 2000.")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option("--output", help="Tokens of its answer; else 500.")
    ] = None,
    ttft_s: Annotated[
        float | None, typer.Option("--ttft", help="Seconds to the first token.")
    ] = None,
    tpot_s: Annotated[
        float | None, typer.Option("--tpot", help="Seconds between tokens, on average.")
    ] = None,
    attainment: Annotated[
        float | None,
        typer.Option(help="Share of requests that get their first token in time; else 0.99."),
    ] = None,
    users: Annotated[
        int | None, typer.Option(help="Requests at the same time; else one full group.")
    ] = None,
    spare: Annotated[
        int, typer.Option(help="Groups that may fail while all users are served.")
    ] = 0,
    objective: Annotated[Objective, typer.Option(help="What is best.")] = Objective.CHEAPEST,
    apart: Annotated[
        bool, typer.Option("--apart", help="Groups that only prefill or decode may win.")
    ] = False,
    kv: Annotated[
        KvFormat | None, typer.Option(help="Of the KV cache; else as in the manifest, or bf16.")
    ] = None,
    loads: Annotated[
        list[str] | None,
        typer.Option(
            "--expert-load",
            metavar="FILE|URL",
            help="How often experts are asked: the answer of a rank to GET /em/experts, in a file "
            "or from the rank itself; once for each rank. Else the usual spread.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="One line each, over all GPUs of the catalogue.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Memory, runners-up, and why others cannot be.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """Say how to serve a model: GPUs, users, speed and price, and what limits them.

    Ends with code 1 when no pool can serve some model at the targets.
    """
    try:
        own = _read_platform(platform)
        subjects: list[Subject] = []
        for model in models:
            least = (input_tokens or 0) + (output_tokens or 0)
            subject, beside = _subject(model, context_tokens, least)
            own = own or beside
            prompt, answer = usual_request(max(2, subject.targets.context_tokens))
            targets = replace(
                subject.targets,
                input_tokens=prompt if input_tokens is None else input_tokens,
                output_tokens=answer if output_tokens is None else output_tokens,
                users=users,
                spare_groups=spare,
            )
            targets = replace(
                targets,
                ttft_s=targets.ttft_s if ttft_s is None else ttft_s,
                tpot_s=targets.tpot_s if tpot_s is None else tpot_s,
                attainment=targets.attainment if attainment is None else attainment,
            )
            cache = subject.kv if kv is None else Dtype(kv.value)
            subjects.append(replace(subject, targets=targets, kv=cache))
        serving = frozenset(Serving) if apart else frozenset({Serving.TOGETHER})
        answers: list[Answer] = []
        told: list[Subject] = []
        for subject in subjects:
            question = Question(
                subject.checkpoints,
                subject.targets,
                objective,
                serving,
                subject.kv,
                _expert_load(loads or [], subject),
            )
            chosen, note = _pools(subject, pools or [], own, nodes, compare)
            subject = replace(subject, warnings=(*subject.warnings, *((note,) if note else ())))
            told.append(subject)
            for pool in chosen:
                started_s = time.perf_counter()
                found = search(question, pool)
                seconds = time.perf_counter() - started_s
                answers.append(Answer(subject, found, seconds, _options(question, pool, subject)))
    except ExpertMeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(answers_as_json(answers), indent=2))
    else:
        # A table in a pipe keeps its lines whole.
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(render(answers, width=console.width, details=not compare, explain=explain))
    served = {id(a.subject) for a in answers if isinstance(a.plan, Plan)}
    if any(id(subject) not in served for subject in told):
        raise typer.Exit(_NOTHING_FITS)


def _expert_load(sources: list[str], subject: Subject) -> ExpertLoad | None:
    if not sources:
        return None
    counts = {c.shape.experts.count if c.shape.experts else 0 for c in subject.checkpoints}
    if 0 in counts:
        raise ManifestError(
            f"--expert-load: {sources[0]}: {subject.name} has no experts; remove the option"
        )
    documents = [_read_load(source) for source in sources]
    return expert_load(", ".join(sources), documents, counts.pop())


def _read_load(source: str) -> Any:
    if "://" not in source:
        return read_file(Path(source))
    token = read_token(MESH_TOKEN_VARIABLE, Path.cwd() / ".expertmesh" / "local" / "mesh_token")
    if token is None:
        raise SetupError(
            f"--expert-load: {source}: {MESH_TOKEN_VARIABLE} is not set, and this folder holds none"
        )
    return read_expert_load(source, token)


def _options(question: Question, pool: GpuPool, subject: Subject) -> tuple[Plan, ...]:
    one = replace(question, targets=replace(question.targets, users=None, spare_groups=0))
    if subject.layouts:
        given = [plan_size(one, subject.engine, pool, layout) for layout in subject.layouts]
        return tuple(plan for plan in given if isinstance(plan, Plan))
    (sizes,) = search_sizes(one, [pool], subject.usd_per_hour)
    return () if isinstance(sizes, NoPlan) else sizes


def _read_platform(file: Path | None) -> PlatformManifest | None:
    if file is None:
        return None
    found = [m for m in read_manifests(file) if isinstance(m, PlatformManifest)]
    if len(found) != 1:
        raise ManifestError(f"{file}: kind: expected one Platform manifest, found {len(found)}")
    return found[0]


def _subject(
    model: str, context_tokens: int | None, least_tokens: int
) -> tuple[Subject, PlatformManifest | None]:
    """And the platform that the same file describes."""
    targets = Targets(
        context_tokens=0,
        input_tokens=0,
        output_tokens=0,
        ttft_s=2.0,
        tpot_s=0.05,
    )
    path = Path(model)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        manifests = read_manifests(path)
        deployments = [m for m in manifests if isinstance(m, DeploymentManifest)]
        platforms = [m for m in manifests if isinstance(m, PlatformManifest)]
        if len(deployments) != 1:
            raise ManifestError(
                f"{model}: kind: expected one ModelDeployment manifest, found {len(deployments)}"
            )
        deployment = deployments[0]
        if deployment.model.source is None:
            raise ManifestError(
                f"{model}: pools: none; an external provider serves this model, so there is "
                "nothing to plan"
            )
        local = deployment.local_source(path.parent)
        source = str(local) if local else deployment.model.source
        loaded = load_shape(
            source,
            revision=deployment.model.revision,
            fetch=hub_file,
            overrides=deployment.model.shape,
        )
        slo, budget = deployment.scaling.slo, deployment.scaling.budget
        targets = replace(
            targets,
            context_tokens=context_tokens or deployment.model.max_model_len,
            ttft_s=slo.ttft_s,
            tpot_s=slo.tpot_s,
            attainment=slo.attainment,
            sequences_per_rank=most_sequences(deployment.engine),
        )
        return (
            Subject(
                deployment.name,
                (Checkpoint(source, loaded.shape),),
                targets,
                deployment.pools,
                (loaded.warning,) if loaded.warning else (),
                kv_format(deployment.engine),
                inf if budget is None or budget.usd_per_hour is None else budget.usd_per_hour,
                tuple(size.to_core() for size in deployment.sizes),
                deployment.engine,
            ),
            platforms[0] if platforms else None,
        )
    checkpoints = checkpoints_named(model, context_tokens)
    warnings: tuple[str, ...] = ()
    if not checkpoints:
        if "/" not in model and not model.startswith(".") and not path.is_dir():
            raise unknown_name(model)
        loaded = load_shape(model, fetch=hub_file)
        checkpoints = (Checkpoint(model, loaded.shape),)
        warnings = (loaded.warning,) if loaded.warning else ()
    longest = max(checkpoint.shape.max_position_embeddings for checkpoint in checkpoints)
    wanted = max(USUAL_CONTEXT, least_tokens)
    context = context_tokens or min(wanted, longest or wanted)
    reading = tuple(
        checkpoint
        for checkpoint in checkpoints
        if not 0 < checkpoint.shape.max_position_embeddings < context
    )
    targets = replace(targets, context_tokens=context)
    return Subject(model, reading or checkpoints, targets, (), warnings), None


def _pools(
    subject: Subject,
    named: list[str],
    platform: PlatformManifest | None,
    nodes: int | None,
    compare: bool,
) -> tuple[list[GpuPool], str | None]:
    """Those that are named, else the manifest's, else all with GPUs, else the usual kinds.

    And a word when these are not the manifest's own.
    """
    now_s = time.time()
    own_prices: tuple[Price, ...] = ()
    mine: dict[str, GpuPool] = {}
    others: list[str] = []
    if platform is not None:
        own_prices = tuple(price.to_core() for price in platform.prices)
        for manifest in platform.pools:
            if manifest.is_external or manifest.accelerator is None:
                others.append(manifest.name)
            else:
                mine[manifest.name] = platform_pool(manifest.to_core())

    def pool(name: str) -> GpuPool:
        if name in others:
            raise ManifestError(
                f"--pool: {name!r}: has no GPUs, so there is nothing to plan; the platform's pools "
                f"with GPUs: {', '.join(mine) or 'none'}"
            )
        if name in mine:
            return mine[name]
        return catalog_pool(name, now_s, own_prices, nodes)

    if named:
        return [pool(name) for name in named], None
    if compare:
        kinds = dict.fromkeys(accelerator.name for accelerator in accelerators().values())
        every = (catalog_pool(kind, now_s, own_prices, nodes) for kind in kinds)
        return [*mine.values(), *every], None
    of_manifest = [mine[name] for name in subject.pools if name in mine]
    if of_manifest or mine:
        missing = [name for name in subject.pools if name not in mine]
        note = f"not planned, as they have no GPUs here: {', '.join(missing)}" if missing else None
        return of_manifest or list(mine.values()), note
    note = None
    if subject.pools:
        why = "have no GPUs" if platform is not None else "are in a platform file: use --platform"
        note = f"its pools {', '.join(subject.pools)} {why}; planned for rented GPUs instead"
    return [catalog_pool(kind, now_s, own_prices, nodes) for kind in USUAL_POOLS], note
