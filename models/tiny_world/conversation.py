"""Whole conversations: who speaks when, in which words, about what."""

import random
from collections.abc import Callable

from tiny_world.cast import ANIMALS, PEOPLE, cast
from tiny_world.facts import animal_exchange, thing_exchange, why_or_how_exchange
from tiny_world.poems import poem_exchange, scene_exchange
from tiny_world.stories import Story, follow_up, story, told, usual_plot
from tiny_world.sums import sums_exchange
from tiny_world.talk import beyond_me, small_talk
from tiny_world.turns import Turn

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a kind storyteller.",
    "You are a friendly assistant who answers in simple English.",
    "Answer in short sentences.",
    "You are a tiny model with sixteen experts.",
    "You help children to learn about the world.",
    "Be kind and brief.",
)
SAMPLE_PROMPTS = (
    "Tell me a story about a fox.",
    "Tell me a story about a lonely robot.",
    "What is the sea?",
    "Why is the sky blue?",
    "Write a short poem about the moon.",
    "What is 4 plus 5?",
    "What is expert parallelism?",
    "Hello, who are you?",
)

Exchange = Callable[[random.Random], tuple[str, str]]
_EXCHANGES: tuple[tuple[float, Exchange], ...] = (
    (0.17, thing_exchange),
    (0.20, animal_exchange),
    (0.10, why_or_how_exchange),
    (0.19, small_talk),
    (0.14, sums_exchange),
    (0.09, poem_exchange),
    (0.04, scene_exchange),
    (0.07, beyond_me),
)


def exchange(rng: random.Random) -> tuple[str, str]:
    functions = [function for _, function in _EXCHANGES]
    weights = [weight for weight, _ in _EXCHANGES]
    return rng.choices(functions, weights)[0](rng)


def as_typed(rng: random.Random, request: str) -> str:
    """A request the way people type: with or without its mark, its capital, a please."""
    text = request.strip()
    if text[-1] not in ".?!" and rng.random() < 0.7:
        text += "?" if text.startswith(("Can", "Could", "Do")) else "."
    if text[-1] == "." and rng.random() < 0.06 and "lease" not in text:
        text = text[:-1] + ", please."
    roll = rng.random()
    if roll < 0.06:
        text = text.rstrip(".?!")
    elif roll < 0.12:
        text = text.lower()
    elif roll < 0.15:
        text = text.rstrip(".?!").lower()
    return text


def conversation(rng: random.Random) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    if rng.random() < 0.3:
        turns.append(Turn("system", rng.choice(SYSTEM_TEXTS)))
    exchanges = rng.choices((1, 2, 3, 4, 5), (62, 18, 10, 6, 4))[0]
    last: Story | None = None
    for _ in range(exchanges):
        if last is not None and rng.random() < 0.5:
            request, reply, last = after_story(rng, last)
        elif rng.random() < 0.3:
            last = story(rng)
            request, reply = last.request, last.text
        else:
            last = None
            request, reply = exchange(rng)
        turns.append(Turn("user", as_typed(rng, request)))
        turns.append(Turn("assistant", reply))
    return tuple(turns)


def after_story(rng: random.Random, last: Story) -> tuple[str, str, Story | None]:
    if rng.random() < 0.65:
        request, reply = follow_up(rng, last)
        return request, reply, last
    another = story(rng, last.cast.kind)
    request = rng.choice(
        ("Tell me another one.", "Another story, please.", "Tell me another story.", "One more!")
    )
    return request, another.text, another


def plain_story(rng: random.Random) -> str:
    """A story by itself, as a completion continues it."""
    kind = rng.choice(ANIMALS + PEOPLE)
    who = cast(rng, kind)
    return told(rng, who, usual_plot(rng, kind), who.fields(rng))
