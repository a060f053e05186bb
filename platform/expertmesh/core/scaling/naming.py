"""Names of groups: `em-<model>-<pool>-<n>`, short enough for every place that shows them."""

import hashlib
from collections.abc import Collection

NAME_LIMIT = 50
"""Characters; the name is also a route prefix and part of Ray's own, longer names."""
_DIGEST_CHARACTERS = 6


def group_name(model: str, pool: str, n: int) -> str:
    """Long model and pool names are cut, and a digest of both then keeps the name unique."""
    full = f"em-{model}-{pool}-{n}"
    if len(full) <= NAME_LIMIT:
        return full
    digest = hashlib.sha256(f"{model}/{pool}".encode()).hexdigest()[:_DIGEST_CHARACTERS]
    tail = f"-{digest}-{n}"
    room = NAME_LIMIT - len("em-") - len(tail) - 1
    model_part = model[: max(room // 2, room - len(pool))]
    pool_part = pool[: room - len(model_part)]
    return f"em-{model_part.rstrip('-')}-{pool_part.rstrip('-')}{tail}"


def number_of(name: str) -> int:
    """The `n` of a group's name, or 0 for a name that has none."""
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isascii() and tail.isdigit() else 0


def next_free_name(model: str, pool: str, n: int, taken: Collection[str]) -> tuple[str, int]:
    """The first free name from `n` on, and its number.

    Names of two models can coincide: `a-b` in pool `c`, and `a` in pool `b-c`.
    """
    while group_name(model, pool, n) in taken:
        n += 1
    return group_name(model, pool, n), n
