"""What the planner is asked, from manifests, the platform's pools and the catalogue."""

import datetime
import difflib
from collections.abc import Iterable
from dataclasses import replace

from expertmesh.core.domain.accelerator import Accelerator, Price, PriceMarket, prices_of, stale
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.planner.question import Checkpoint, GpuPool
from expertmesh.errors import ManifestError
from expertmesh.spec.catalog import models
from expertmesh.spec.catalog_hardware import accelerators, prices

OWN_PRICE = "from the platform file"
NODES = 8
"""Of a pool that is only a kind of GPU."""
RACK_GPUS_PER_NODE = 4
"""A compute tray of an NVL72."""


def platform_pool(pool: Pool) -> GpuPool:
    """Raises ManifestError for a pool whose accelerator the catalogue does not know."""
    assert pool.accelerator is not None, f"pool {pool.name} has no GPUs"
    return GpuPool(
        name=pool.name,
        accelerator=known_accelerator(pool.accelerator, f"pool {pool.name}: accelerator"),
        gpus_per_node=pool.accelerators_per_node,
        max_nodes=pool.max_nodes,
        usd_per_gpu_hour=pool.usd_per_node_hour / pool.accelerators_per_node,
        market=pool.market.value,
        price_note=OWN_PRICE,
    )


def catalog_pool(
    name: str, now_s: float, own_prices: Iterable[Price] = (), nodes: int | None = None
) -> GpuPool:
    """A kind of GPU at the lowest price that is asked on demand, else of any other market.

    `own_prices` replace the catalogue's. Raises ManifestError for a GPU that is not known.
    """
    accelerator = known_accelerator(name, "pool")
    per_node = min(accelerator.link_domain, 8)
    if accelerator.link_domain > 8:
        per_node = RACK_GPUS_PER_NODE
    price = _lowest(accelerator, own_prices) or _lowest(accelerator, prices())
    pool = GpuPool(
        name=accelerator.name,
        accelerator=accelerator,
        gpus_per_node=per_node,
        max_nodes=nodes or max(NODES, accelerator.link_domain // per_node),
        usd_per_gpu_hour=0.0,
        market=PriceMarket.ON_DEMAND.value,
        price_note="no price is known; write one under prices in the platform file",
    )
    if price is None:
        return pool
    day = datetime.datetime.fromtimestamp(price.dated_s, datetime.UTC).date().isoformat()
    note = f"{price.provider}, {day}"
    if stale(price, now_s):
        note += ", STALE: older than 90 days"
    return replace(
        pool,
        usd_per_gpu_hour=price.usd_per_hour,
        market=price.market.value,
        price_note=note,
    )


def known_accelerator(name: str, field: str) -> Accelerator:
    known = {key.lower(): value for key, value in accelerators().items()}
    found = known.get(name.lower())
    if found is None:
        names = sorted({accelerator.name for accelerator in known.values()})
        close = difflib.get_close_matches(name.upper(), names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the catalogue has {', '.join(names)}"
        raise ManifestError(f"{field}: {name!r}: no such GPU; {hint}")
    return found


def checkpoints_named(name: str, context_tokens: int | None = None) -> tuple[Checkpoint, ...]:
    """Of a model of the catalogue, one for each format; the first that reads such a context.

    Empty when the catalogue has no model of this name.
    """
    found: dict[object, Checkpoint] = {}
    for known in models().values():
        if known.name.lower() != name.lower():
            continue
        shape = known.shape
        before = found.get(shape.quantisation)
        if before is None or (
            context_tokens is not None
            and before.shape.max_position_embeddings < context_tokens
            and shape.max_position_embeddings > before.shape.max_position_embeddings
        ):
            found[shape.quantisation] = Checkpoint(known.id, shape)
    return tuple(found.values())


def unknown_name(name: str) -> ManifestError:
    """For a model that is neither a path nor a Hugging Face id, nor named in the catalogue."""
    names = list(dict.fromkeys(known.name for known in models().values()))
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(names)}"
    return ManifestError(
        f"{name}: the catalogue has no such model; {hint} "
        "Or write ./<folder>, or <maker>/<model> of Hugging Face"
    )


def _lowest(accelerator: Accelerator, offers: Iterable[Price]) -> Price | None:
    offers = tuple(offers)
    for market in (PriceMarket.ON_DEMAND, PriceMarket.SPOT, PriceMarket.OWNED):
        found = prices_of(offers, accelerator, market)
        if found:
            return found[0]
    return None
