from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.routing.prefix import PrefixIndex, prefix_blocks

ALL = (1 << 300) - 1


def test_blocks_stand_for_all_bytes_up_to_their_end() -> None:
    text = bytes(range(256)) * 8
    blocks = prefix_blocks(text)
    assert len(blocks) == 4 and len(set(blocks)) == 4
    assert prefix_blocks(text[:1100]) == blocks[:2], "the rest of 76 bytes is no block"
    changed = b"x" + text[1:]
    assert not set(prefix_blocks(changed)) & set(blocks), "the same bytes after another beginning"
    late = text[:1024] + b"x" + text[1025:]
    assert prefix_blocks(late)[:2] == blocks[:2] and prefix_blocks(late)[2] != blocks[2]


def test_short_and_long_prompts() -> None:
    assert prefix_blocks(b"") == () == prefix_blocks(b"x" * 511)
    assert len(prefix_blocks(b"x" * 100_000)) == 64
    assert len(prefix_blocks(b"x" * 100, block_bytes=10, most=3)) == 3


def test_the_longest_match_comes_first() -> None:
    index = PrefixIndex()
    bits = index.keep(["a", "b", "c"])
    index.record((1, 2, 3, 4), bits["a"])
    index.record((1, 2, 30), bits["b"])
    index.record((9,), bits["c"])
    assert index.matches((1, 2, 3, 40), ALL) == [(3, bits["a"]), (2, bits["b"])]
    assert index.matches((1, 2, 3, 40), bits["b"]) == [(2, bits["b"])]
    assert index.matches((7, 1, 2), ALL) == [] == index.matches((), ALL)


prompts = st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), max_size=9)).map(
    lambda made: tuple(hash((made[0], *made[1][: n + 1])) for n in range(len(made[1])))
)


@given(st.lists(st.tuples(prompts, st.integers(0, 4)), max_size=60), prompts, st.integers(1, 40))
def test_matches_are_those_of_a_plain_search(
    records: list[tuple[tuple[int, ...], int]], wanted: tuple[int, ...], most: int
) -> None:
    index = PrefixIndex(most)
    bits = index.keep([str(n) for n in range(5)])
    generations: list[dict[int, set[int]]] = [{}, {}]
    for blocks, name in records:
        if len(generations[0]) >= max(1, most // 2):
            generations = [{}, generations[0]]
        for block in blocks:
            generations[0].setdefault(block, set()).add(bits[str(name)])
        index.record(blocks, bits[str(name)])
    depths = dict.fromkeys(bits.values(), 0)
    for bit in depths:
        for block in wanted:
            if not any(bit in generation.get(block, ()) for generation in generations):
                break
            depths[bit] += 1
    expected: dict[int, int] = {}
    for bit, depth in depths.items():
        if depth:
            expected[depth] = expected.get(depth, 0) | bit
    assert index.matches(wanted, ALL) == sorted(expected.items(), reverse=True)
    assert len(index) <= most + 2 * 9


def test_what_is_not_seen_for_long_is_forgotten_and_what_is_seen_stays() -> None:
    index = PrefixIndex(100)
    bits = index.keep(["a", "b"])
    index.record((-1, -2), bits["a"])
    index.record((-5, -6), bits["b"])
    index.record((-5, -6), bits["a"])
    for n in range(0, 1000, 2):
        index.record((n, n + 1), bits["b"])
        index.record((-5, -6), bits["b"])
        assert len(index) <= 104
    assert index.matches((-1, -2), ALL) == []
    assert index.matches((-5, -6), ALL) == [(2, bits["b"])], "a has not seen it for long"


def test_a_rank_that_left_is_not_found_under_the_bit_of_one_that_joined() -> None:
    index = PrefixIndex()
    bits = index.keep(["a", "b"])
    index.record((1,), bits["b"])
    index.keep(["a"])
    bits = index.keep(["a", "c"])
    assert index.matches((1,), bits["a"] | bits["c"]) == []
    bits = index.keep(["a", "b", "c"])
    assert index.matches((1,), sum(bits.values())) == [], "whoever comes back has a new cache"


def test_bits_stay_few_however_many_ranks_come_and_go() -> None:
    index = PrefixIndex()
    for n in range(1000):
        bits = index.keep([f"r{n}", f"r{n + 1}"])
        index.record((1, n), bits[f"r{n}"])
        assert max(bits.values()).bit_length() <= 256 and len(set(bits.values())) == 2
        assert index.matches((1, n), sum(bits.values())) == [(2, bits[f"r{n}"])]
    wide = index.keep([f"w{n}" for n in range(500)])
    assert len(set(wide.values())) == 500
