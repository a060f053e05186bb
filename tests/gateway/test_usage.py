import pytest

from expertmesh.gateway.usage import PromptSizes, TokenCount, read_usage


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b'{"usage":{"prompt_tokens":5,"completion_tokens":3}}', TokenCount(5, 0, 3)),
        (
            b'{"choices":[{"x":1}],"usage":{"prompt_tokens":5,"completion_tokens":3,'
            b'"prompt_tokens_details":{"cached_tokens":4}}}',
            TokenCount(5, 4, 3),
        ),
        (b'{"usage":{"prompt_tokens":5,"total_tokens":5}}', TokenCount(5, 0, 0)),
        (b'{"usage":{"prompt_tokens":5,"completion_tokens":null}}', TokenCount(5, 0, 0)),
        (b'{"usage":{"input_tokens":5,"output_tokens":3}}', TokenCount(5, 0, 3)),
        (
            b'{"usage":{"input_tokens":5,"output_tokens":3,"cache_read_input_tokens":2,'
            b'"cache_creation_input_tokens":1}}',
            TokenCount(8, 2, 3),
        ),
        (
            b'{"usage":{"input_tokens":5,"input_tokens_details":{"cached_tokens":2},'
            b'"output_tokens":3}}',
            TokenCount(5, 2, 3),
        ),
        (b'{"message":"text","usage":{"prompt_tokens":1}}', TokenCount(1, 0, 0)),
        (
            b'{"usage":{"prompt_tokens":2,"prompt_tokens_details":{"cached_tokens":9}}}',
            TokenCount(2, 2, 0),
        ),
        (b'{"usage":{"prompt_tokens":-2,"completion_tokens":-1}}', TokenCount(0, 0, 0)),
        (b'{"usage":null}', None),
        (b"{}", None),
        (b'{"usage":"many"}', None),
        (b"no JSON", None),
        (b"", None),
    ],
)
def test_read_usage(data: bytes, count: TokenCount | None) -> None:
    assert read_usage(data) == count


def test_prompt_sizes_learn_each_models_ratio() -> None:
    sizes = PromptSizes()
    assert sizes.guess("m", 400, 4096) == 100
    sizes.learn("m", 600, 100)
    assert sizes.guess("m", 600, 4096) == 100
    for _ in range(200):
        sizes.learn("m", 200, 100)
    assert sizes.guess("m", 200, 4096) == 100
    assert sizes.guess("other", 400, 4096) == 100
    sizes.learn("m", 10, 0)
    assert sizes.guess("m", 200, 4096) == 100


def test_a_guess_stays_within_the_context() -> None:
    assert PromptSizes().guess("m", 10_000_000, 4096) == 4096
    assert PromptSizes().guess("m", 0, 4096) == 1


def test_a_rank_cannot_write_numbers_that_the_ledger_cannot_hold() -> None:
    data = b'{"usage":{"prompt_tokens":1%b,"completion_tokens":9%b}}' % (b"0" * 18, b"0" * 17)
    assert read_usage(data) == TokenCount(2**40, 0, 2**40)
    assert read_usage(b'{"usage":{"prompt_tokens":-5,"completion_tokens":-1}}') == TokenCount(
        0, 0, 0
    )
