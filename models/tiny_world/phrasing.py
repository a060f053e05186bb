"""Turns patterns into sentences.

A pattern holds alternatives, `[big|very big]`, which may nest, and fields, `{hero}`.
"""

import random
import re
from collections.abc import Mapping

from tiny_world.text import words

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")
_STARTS = words("word starts")
_MIDDLES = words("word middles")
_ENDS = words("word ends")
_SOUNDS_LIKE_YOU = re.compile(r"\b([Aa])n (?=(?:uni|use|one\b|once))")


def choose(rng: random.Random, pattern: str) -> str:
    """Picks one alternative in every bracket, innermost first."""
    while found := _INNERMOST.search(pattern):
        picked = rng.choice(found.group(1).split("|"))
        pattern = pattern[: found.start()] + picked + pattern[found.end() :]
    return pattern


def fill(rng: random.Random, pattern: str, fields: Mapping[str, str] | None = None) -> str:
    """One sentence or more: alternatives picked, fields put in, a or an, a capital first."""
    text = choose(rng, pattern).format_map(fields or {})
    text = _SOUNDS_LIKE_YOU.sub(r"\1 ", _ARTICLE.sub(r"\1n ", text))
    return capital(text)


def capital(text: str) -> str:
    """A capital at the start, behind a quotation mark too; figures and vLLM stay as they are."""
    start = 1 if text.startswith('"') else 0
    if text.startswith("vLLM"):
        return text
    return text[:start] + text[start : start + 1].upper() + text[start + 1 :]


def sentence_case(text: str) -> str:
    """A capital after every end of a sentence, and where speech follows a comma."""
    out: list[str] = []
    starts = False
    for index, char in enumerate(text):
        out.append(char.upper() if starts else char)
        if char not in '" ':
            starts = False
        ends_sentence = char in ".!?" and text[index + 1 : index + 2] == " "
        opens_speech = char == '"' and text[max(0, index - 2) : index] == ", "
        starts = starts or ends_sentence or opens_speech
    return "".join(out)


def with_article(noun: str) -> str:
    return _SOUNDS_LIKE_YOU.sub(r"\1 ", _ARTICLE.sub(r"\1n ", f"a {noun}"))


def invented_word(rng: random.Random) -> str:
    """A word nobody has seen, so that a model must copy it instead of knowing it."""
    count = rng.choice((1, 2, 2))
    syllables = [rng.choice(_STARTS) + rng.choice(_MIDDLES) for _ in range(count)]
    return "".join(syllables) + rng.choice(_ENDS)
