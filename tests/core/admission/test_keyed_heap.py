from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.admission.keyed_heap import KeyedHeap


def test_the_least_key_is_first_and_of_equal_ones_the_earliest() -> None:
    heap: KeyedHeap[str] = KeyedHeap()
    assert heap.first() is None and heap.first_key() is None
    heap.set("a", 2.0)
    heap.set("b", 1.0)
    heap.set("c", 1.0)
    assert (heap.first(), heap.first_key()) == ("b", 1.0)
    heap.set("b", 3.0)
    assert heap.first() == "c"
    heap.discard("c")
    heap.discard("c")
    assert heap.first() == "a" and len(heap) == 2 and "c" not in heap


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 5)), max_size=400))
def test_it_is_the_minimum_of_a_dictionary(operations: list[tuple[int, int | None]]) -> None:
    heap: KeyedHeap[int] = KeyedHeap()
    known: dict[int, int] = {}
    for item, key in operations:
        known.pop(item, None)  # A key that is set again is the latest.
        if key is None:
            heap.discard(item)
        else:
            heap.set(item, key)
            known[item] = key
        assert heap.first() == (min(known, key=known.__getitem__) if known else None)
        assert len(heap) == len(known)


def test_memory_follows_the_items_not_the_operations() -> None:
    heap: KeyedHeap[int] = KeyedHeap()
    for number in range(10_000):
        heap.set(number % 10, -number)
    assert len(heap._heap) < 200
    for number in range(10):
        heap.discard(number)
    assert len(heap._heap) <= 64
