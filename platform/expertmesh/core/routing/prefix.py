"""Which ranks have seen the beginning of a prompt, and so may hold it in their KV cache."""

from collections.abc import Collection, Sequence

_MOST_BITS = 256


def prefix_blocks(data: bytes, block_bytes: int = 512, most: int = 64) -> tuple[int, ...]:
    """One number for each whole block of a prompt, which stands for all bytes up to its end.

    Numbers differ between processes: they are for a `PrefixIndex` of the same process only.
    """
    blocks = []
    before = 0
    for start in range(0, min(len(data) // block_bytes, most) * block_bytes, block_bytes):
        before = hash((before, data[start : start + block_bytes]))
        blocks.append(before)
    return tuple(blocks)


class PrefixIndex:
    """Block to the ranks that were lately sent it, as a bit mask; bounded.

    Two generations: what is neither written in the young nor in the old one is forgotten. When the
    young one is full, it becomes the old one.
    """

    __slots__ = ("_bits", "_generation_blocks", "_given", "_old", "_young")

    def __init__(self, most_blocks: int = 65_536) -> None:
        """It holds a prompt more than `most_blocks` at most."""
        self._generation_blocks = max(1, most_blocks // 2)
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._bits: dict[str, int] = {}
        self._given = 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def keep(self, names: Collection[str]) -> dict[str, int]:
        """The bit of each of these ranks; all others are forgotten.

        Bits are not given twice, as masks still hold those of ranks that left. When too many have
        been given, the index starts anew.
        """
        bits = {name: self._bits[name] for name in names if name in self._bits}
        if self._given + len(names) - len(bits) > max(_MOST_BITS, 4 * len(names)):
            bits, self._given = {}, 0
            self._young, self._old = {}, {}
        for name in names:
            if name not in bits:
                bits[name] = 1 << self._given
                self._given += 1
        self._bits = bits
        return bits

    def matches(self, blocks: Sequence[int], among: int) -> list[tuple[int, int]]:
        """Number of leading blocks and those of the ranks `among` (their bits) that have seen so
        many and no more of them, the longest match first."""
        young, old = self._young, self._old
        found: list[tuple[int, int]] = []
        count = len(blocks)
        at = 0
        while at < count:
            block = blocks[at]
            mask = (young.get(block, 0) | old.get(block, 0)) & among
            if not mask:
                break
            # Who has a block has all before it, so masks only shrink: find where this one ends.
            low, high, after = at, count, 0
            middle = count - 1
            while low < middle:
                block = blocks[middle]
                reached = (young.get(block, 0) | old.get(block, 0)) & among
                if reached == mask:
                    low = middle
                else:
                    high, after = middle, reached
                middle = (low + high) // 2
            found.append((high, mask & ~after))
            at = high
        found.reverse()
        return found

    def record(self, blocks: Sequence[int], bit: int) -> None:
        """The rank of this bit gets a prompt of these blocks."""
        young = self._young
        # Between prompts only, so that who has a block always has those before it.
        if len(young) >= self._generation_blocks:
            self._old = young
            young = self._young = {}
        for block in reversed(blocks):
            mask = young.get(block, 0)
            if mask & bit:
                break
            young[block] = mask | bit
