"""The text the tiny model is trained on: complete sentences, the same ones for one seed."""

import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))

from tiny_world.conversation import conversation, plain_story
from tiny_world.facts import animal_exchange, thing_exchange, why_or_how_exchange
from tiny_world.phrasing import choose, fill, sentence_case, with_article
from tiny_world.plots import PLOTS
from tiny_world.poems import poem_exchange, scene_exchange
from tiny_world.stories import follow_up, story
from tiny_world.sums import sums_exchange
from tiny_world.talk import beyond_me, small_talk

EXCHANGES = [
    animal_exchange,
    beyond_me,
    poem_exchange,
    scene_exchange,
    small_talk,
    sums_exchange,
    thing_exchange,
    why_or_how_exchange,
]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda function: function.__name__)
def test_exchange_is_finished_english(exchange):
    rng = random.Random(1)
    for _ in range(300):
        request, reply = exchange(rng)
        assert_finished(request)
        assert_finished(reply)
        assert reply[-1] in '.!?"', reply
        assert reply[0].isupper() or reply[0].isdigit() or reply[0] == '"' or reply[:4] == "vLLM"


def test_every_plot_tells_a_finished_story():
    rng = random.Random(2)
    told = [story(rng) for _ in range(1500)]
    assert {one.plot.topic for one in told} == {plot.topic for plot in PLOTS}
    for one in told:
        assert_finished(one.request)
        assert_finished(one.text)
        assert one.cast.hero in one.text
        assert one.cast.kind in one.text


def test_follow_up_is_answered_from_the_story():
    rng = random.Random(3)
    for _ in range(300):
        one = story(rng)
        question, reply = follow_up(rng, one)
        assert_finished(question)
        assert_finished(reply)
        assert question.endswith("?")


def test_one_seed_gives_one_text():
    first = [conversation(random.Random(4)), plain_story(random.Random(5))]
    second = [conversation(random.Random(4)), plain_story(random.Random(5))]
    assert first == second


def test_conversation_alternates_and_ends_with_the_assistant():
    rng = random.Random(6)
    for _ in range(300):
        roles = [turn.role for turn in conversation(rng) if turn.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_sums_are_right():
    rng = random.Random(7)
    found = 0
    for _ in range(2000):
        _, reply = sums_exchange(rng)
        if match := re.fullmatch(r"(\d+) (plus|minus) (\d+) is (\d+)\.", reply):
            a, word, b, result = match.groups()
            assert int(result) == int(a) + int(b) * (1 if word == "plus" else -1)
            found += 1
    assert found > 200


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("fox", "a fox"),
        ("owl", "an owl"),
        ("useful owl", "a useful owl"),
        ("old fox", "an old fox"),
    ],
)
def test_article_fits_the_sound(noun, expected):
    assert with_article(noun) == expected


def test_nested_alternatives_are_all_reached():
    rng = random.Random(8)
    assert {choose(rng, "[a|b[c|d]]") for _ in range(100)} == {"a", "bc", "bd"}


def test_sentences_and_speech_begin_with_a_capital():
    pattern = 'he said, "come in. it is {word}." then he left.'
    filled = sentence_case(fill(random.Random(9), pattern, {"word": "cold"}))
    assert filled == 'He said, "Come in. It is cold." then he left.'


def assert_finished(text):
    assert not re.search(r"[\[\]{}|]", text), text
    assert "  " not in text, text
    assert not re.search(r"\ba (?!one\b)[aeio]|\ban (?!hour)[^aeiou]", text), text
