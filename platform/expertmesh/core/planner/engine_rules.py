"""Engine arguments with which vLLM 0.29 would not start a group.

Whether there is memory for them is the plan's to say.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from expertmesh.core.domain.model_shape import ModelShape
from expertmesh.core.perf.layout import Layout
from expertmesh.core.planner.candidates import Backend, Role, backends, movable_experts
from expertmesh.core.planner.question import GpuPool

_KNOWN = tuple(Backend)


def broken_rules(
    engine: Mapping[str, Any], shape: ModelShape, layout: Layout, pool: GpuPool
) -> Iterator[tuple[str, object, str]]:
    """Argument, value, and what is wrong with a remedy; nothing when the planner knows of nothing.

    `engine` holds all arguments of the group, those that the plan adds included.
    """
    yield from _exchange(engine, shape, layout, pool)
    tokens, sequences = engine.get("max_num_batched_tokens"), engine.get("max_num_seqs")
    if isinstance(tokens, int) and isinstance(sequences, int) and sequences > tokens:
        yield (
            "max_num_seqs",
            sequences,
            f"is above max_num_batched_tokens {tokens}, and each sequence needs a token of a step; "
            f"write at most {tokens}",
        )
    if engine.get("enable_eplb") and shape.experts is not None:
        config = engine.get("eplb_config")
        copies = config.get("num_redundant_experts", 0) if isinstance(config, Mapping) else 0
        slots = shape.experts.count + copies
        if not movable_experts(shape):
            yield ("enable_eplb", True, "vLLM cannot move experts of this model; remove it")
        elif layout.expert > 1 and slots % layout.expert:
            yield (
                "eplb_config",
                copies,
                f"{shape.experts.count} + {copies} experts do not divide over {layout.expert} "
                f"workers; write {copies + -slots % layout.expert}",
            )


def _exchange(
    engine: Mapping[str, Any], shape: ModelShape, layout: Layout, pool: GpuPool
) -> Iterator[tuple[str, object, str]]:
    named = engine.get("all2all_backend")
    if named not in _KNOWN or layout.data == 1 or shape.experts is None:
        return
    backend = Backend(named)
    possible = {*backends(shape, pool, layout, Role.DECODE)}
    possible |= {*backends(shape, pool, layout, Role.PREFILL)}
    if backend not in possible:
        names = ", ".join(sorted(other.value for other in possible))
        yield (
            "all2all_backend",
            named,
            f"has no kernels for this model on {layout.world_size} {pool.accelerator.name}; write "
            f"one of {names}",
        )
