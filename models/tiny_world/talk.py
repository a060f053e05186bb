"""Small talk: greetings, thanks, who the model is, feelings, jokes, and what it does not know."""

import random

from tiny_world.phrasing import fill, invented_word, sentence_case, with_article
from tiny_world.text import entry, lines, words

EXCHANGES = tuple(entry(line) for line in lines("small_talk"))
BEYOND = lines("beyond")
STATEMENTS = frozenset(words("statement starts"))

_BUT = (
    "[ask me about animals, nature or everyday things|I can tell you a story or answer a simple "
    "question], and I will [do my best|try to help]."
)
_TOO_HARD = f"[I am sorry|sorry], that is [too hard for a small model|more than I know]. {_BUT}"
_NO_SUCH_WORD = f"[I am sorry|sorry], I do not know [that word|what that is]. {_BUT}"


def small_talk(rng: random.Random) -> tuple[str, str]:
    questions, (reply,) = rng.choice(EXCHANGES)
    question = rng.choice(questions)
    statement = question.split()[0] in STATEMENTS or len(question.split()) < 2
    mark = rng.choice(".!") if statement else "?"
    return fill(rng, question) + mark, sentences(rng, reply)


def sentences(rng: random.Random, pattern: str) -> str:
    return sentence_case(fill(rng, pattern))


def beyond_me(rng: random.Random) -> tuple[str, str]:
    """A request out of the small world, or a word nobody knows."""
    if rng.random() < 0.5:
        question = fill(rng, rng.choice(BEYOND))
        asks = question.split()[0] in ("What", "Who", "Which", "When", "How")
        return question + ("?" if asks else "."), sentences(rng, _TOO_HARD)
    word = invented_word(rng)
    question = fill(
        rng,
        "[what is {one}?|tell me about {one}.|explain {word}.|what does {word} mean?|"
        "who is {name}?|what is the {word}?|how does {one} work?]",
        {"one": with_article(word), "word": word, "name": word.capitalize()},
    )
    return question, sentences(rng, _NO_SUCH_WORD)
