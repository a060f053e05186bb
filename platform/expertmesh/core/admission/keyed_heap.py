"""A heap whose items can change their key or leave."""

from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T")

_FEW = 64
"""Stale entries up to here are not worth a clean-up."""


class KeyedHeap(Generic[T]):
    """The item with the least key first; of equal keys the one that was set first.

    All operations take O(log items), amortised: an entry that no longer counts stays until it comes
    to the top, or until there are more such entries than items.
    """

    __slots__ = ("_heap", "_numbers", "_sets")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._numbers: dict[T, int] = {}
        """Number of the one entry of an item that counts."""
        self._sets = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, item: T) -> bool:
        return item in self._numbers

    def set(self, item: T, key: float) -> None:
        """Add the item, or change its key."""
        self._sets = number = self._sets + 1
        self._numbers[item] = number
        heap = self._heap
        heappush(heap, (key, number, item))
        if len(heap) > 2 * len(self._numbers) + _FEW:
            self._drop_stale()

    def discard(self, item: T) -> None:
        self._numbers.pop(item, None)
        if len(self._heap) > 2 * len(self._numbers) + _FEW:
            self._drop_stale()

    def first(self) -> T | None:
        heap, numbers = self._heap, self._numbers
        while heap:
            _, number, item = heap[0]
            if numbers.get(item) == number:
                return item
            heappop(heap)
        return None

    def first_key(self) -> float | None:
        return None if self.first() is None else self._heap[0][0]

    def _drop_stale(self) -> None:
        numbers = self._numbers
        self._heap = [entry for entry in self._heap if numbers.get(entry[2]) == entry[1]]
        heapify(self._heap)
