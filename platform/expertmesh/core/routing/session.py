"""Which ranks a session prefers: rendezvous hashing, the same in every worker.

Sessions are hashed into buckets and each bucket ranks the ranks by a hash of both (Thaler and
Ravishankar, "A name-based mapping scheme for rendezvous", 1996). A rank that joins or leaves moves
only the sessions that it gets or had. Buckets make the order of a session one look-up, however
many ranks there are.
"""

from collections.abc import Sequence
from hashlib import blake2b
from zlib import crc32

BUCKETS = 1 << 13
"""Enough for hundreds of ranks to get even shares."""
_MASK = (1 << 64) - 1


def bucket_of(session: bytes) -> int:
    """Not the built-in hash: it differs between processes."""
    return crc32(session) & (BUCKETS - 1)


def rank_seed(name: str) -> int:
    """The rank's part of the hash; made once per rank."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def rank_order(seeds: Sequence[int], bucket: int, most: int) -> tuple[int, ...]:
    """Positions of the `most` ranks that a bucket likes best, the best first."""
    scores = [_mixed(seed ^ (bucket * 0x9E3779B97F4A7C15 & _MASK)) for seed in seeds]
    return tuple(sorted(range(len(seeds)), key=scores.__getitem__, reverse=True)[:most])


def _mixed(value: int) -> int:
    """The finaliser of splitmix64: every bit of the input moves half of the output's."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
