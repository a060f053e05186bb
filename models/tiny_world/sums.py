"""Small knowledge with rules: sums, counting, order, opposites, colours, sizes, lists."""

import random

from tiny_world.phrasing import fill, with_article
from tiny_world.text import words

NUMBERS = words("numbers")
DAYS = words("days")
MONTHS = words("months")
SEASONS = words("seasons")
OPPOSITES = words("opposites")
COLOURED = words("coloured")
COLOURED_ALWAYS = words("coloured always")
BY_SIZE = words("by size")
IRREGULAR = words("irregular")
REGULAR = words("regular")
GROUPS = words("groups")


def sums_exchange(rng: random.Random) -> tuple[str, str]:
    return rng.choice(
        (_sum, _sum, _sum, _count, _order, _opposite, _colour, _size, _plural, _naming)
    )(rng)


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(1, 11), rng.randrange(1, 11)
    if rng.random() < 0.6:
        word, sign, result = "plus", "+", a + b
    else:
        a, b = max(a, b), min(a, b)
        word, sign, result = "minus", "-", a - b
    if rng.random() < 0.6:
        question = f"[what is|how much is|what is] {a} [{word}|{sign}] {b}?"
        reply = f"{a} {word} {b} is {result}."
    else:
        question = f"[what is|how much is] {NUMBERS[a]} {word} {NUMBERS[b]}?"
        reply = f"{NUMBERS[a]} {word} {NUMBERS[b]} is {NUMBERS[result]}."
    return fill(rng, question), fill(rng, reply)


def _count(rng: random.Random) -> tuple[str, str]:
    a = rng.randrange(0, 14)
    b = rng.randrange(a + 2, min(a + 11, 21))
    backwards = rng.random() < 0.2
    words = NUMBERS[a : b + 1]
    if backwards:
        words = words[::-1]
        a, b = b, a
    question = fill(
        rng,
        "[count from {a} to {b}.|can you count from {a} to {b}?|please count from {a} to {b}.]",
        {"a": rng.choice((NUMBERS[a], str(a))), "b": rng.choice((NUMBERS[b], str(b)))},
    )
    return question, fill(rng, ", ".join(words) + ".")


def _order(rng: random.Random) -> tuple[str, str]:
    row, noun = rng.choice(((DAYS, "day"), (DAYS, "day"), (MONTHS, "month"), (SEASONS, "season")))
    index = rng.randrange(len(row))
    after = rng.random() < 0.6
    other = row[(index + (1 if after else -1)) % len(row)]
    word = "after" if after else "before"
    question = fill(rng, f"[which|what] {noun} comes {word} {row[index]}?")
    return question, fill(rng, f"[{other} comes {word} {row[index]}|it is {other}].")


def _opposite(rng: random.Random) -> tuple[str, str]:
    word, other = rng.choice(OPPOSITES).split(":")
    if rng.random() < 0.4 and word not in ("old", "young", "light", "heavy"):
        word, other = other, word
    question = fill(rng, f"[what is the opposite of {word}?|tell me the opposite of {word}.]")
    return question, fill(rng, f"the opposite of {word} is {other}.")


def _colour(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        noun, colour = rng.choice(COLOURED).split(":")
        noun = with_article(noun)
    else:
        noun, colour = rng.choice(COLOURED_ALWAYS).split(":")
    return fill(rng, f"[what|which] colour is {noun}?"), fill(rng, f"{noun} is {colour}.")


def _size(rng: random.Random) -> tuple[str, str]:
    small, big = sorted(rng.sample(range(len(BY_SIZE)), 2))
    bigger = rng.random() < 0.6
    pair = [with_article(BY_SIZE[small]), with_article(BY_SIZE[big])]
    names = rng.sample(pair, 2)
    word = "bigger" if bigger else "smaller"
    question = fill(rng, f"[which is|what is] {word}, {names[0]} or {names[1]}?")
    winner, loser = (pair[1], pair[0]) if bigger else (pair[0], pair[1])
    return question, fill(rng, f"{winner} is {word} than {loser}.")


def _plural(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        one, many = rng.choice(IRREGULAR).split(":")
    else:
        one = rng.choice(REGULAR)
        many = one + "s"
    return fill(rng, f"what is the plural of {one}?"), fill(rng, f"the plural of {one} is {many}.")


def _naming(rng: random.Random) -> tuple[str, str]:
    name, members = rng.choice(GROUPS).split("=")
    count = rng.choice((2, 3, 3))
    picked = rng.sample(members.split(", "), count)
    listed = ", ".join(picked[:-1]) + " and " + picked[-1]
    number = NUMBERS[count]
    question = fill(rng, f"[name|tell me|list] {number} {name}.")
    return question, fill(rng, f"{number} {name} are {listed}.")
