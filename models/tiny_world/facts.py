"""Questions and answers about a small world: animals, nature, food, work, machines."""

import random
from dataclasses import dataclass

from tiny_world.phrasing import fill, sentence_case, with_article
from tiny_world.text import entry, lines


@dataclass(frozen=True, slots=True)
class Animal:
    name: str
    plural: str
    looks: str
    home: str
    food: str
    sound: str
    fact: str
    swims: bool
    flies: bool


def _animal(line: str) -> Animal:
    name, plural, looks, home, food, sound, fact, moves = line.split(";")
    return Animal(name, plural, looks, home, food, sound, fact, "s" in moves, "f" in moves)


ANIMALS = tuple(_animal(line) for line in lines("animals"))
THINGS = tuple(entry(line) for line in lines("things"))
WHY_AND_HOW = tuple(entry(line) for line in lines("why_and_how"))


def thing_exchange(rng: random.Random) -> tuple[str, str]:
    names, sentences = rng.choice(THINGS)
    question = fill(
        rng,
        "[what is {name}?|what is {name}?|what is {name}?|tell me about {name}.|explain {name}.|"
        "can you explain {name}?|what do you know about {name}?|please tell me about {name}.|"
        "describe {name}.|what does {name} mean?|what's {name}?|say something about {name}.|"
        "explain {name} in simple words.|explain {name} in one sentence.]",
        {"name": rng.choice(names)},
    )
    if question.startswith("What is") and question.removesuffix("?").endswith("s"):
        words = rng.choice(names)
        if words.endswith("s") and words.islower() and " " not in words:
            question = f"What are {words}?"
    kept = sentences if rng.random() < 0.75 else sentences[:2]
    return question, answer_text(rng, kept)


def why_or_how_exchange(rng: random.Random) -> tuple[str, str]:
    names, sentences = rng.choice(WHY_AND_HOW)
    return fill(rng, rng.choice(names)) + "?", answer_text(rng, sentences)


def answer_text(rng: random.Random, sentences: tuple[str, ...]) -> str:
    return sentence_case(" ".join(fill(rng, s).removesuffix(".") + "." for s in sentences))


def animal_exchange(rng: random.Random) -> tuple[str, str]:
    animal = rng.choice(ANIMALS)
    fields = {
        "one": with_article(animal.name),
        "many": animal.plural,
        "looks": with_article(animal.looks),
        "home": animal.home,
        "food": animal.food,
        "sound": animal.sound,
        "fact": animal.fact,
        "name": animal.name,
    }
    question, reply = rng.choice(
        (
            (
                "[what is {one}?|what is {one}?|what is {one}?|tell me about {many}.|"
                "describe {one}.|what do you know about {many}?|tell me about the {name}.|"
                "what are {many}?]",
                "{one} is {looks}. it lives {home}[. it eats {food}| and eats {food}]. {fact}.",
            ),
            (
                "[what does {one} eat?|what do {many} eat?|what is the food of {one}?]",
                "[{one} eats|{many} eat] {food}.",
            ),
            (
                "[where does {one} live?|where do {many} live?|where can I find {one}?]",
                "[{one} lives|{many} live] {home}.",
            ),
            (
                "[what sound does {one} make?|what does {one} say?|which sound does {one} make?]",
                "{one} {sound}.",
            ),
            (
                "[what does {one} look like?|how does {one} look?]",
                "{one} is {looks}.",
            ),
            (
                "[tell me something about {many}.|tell me a fact about {many}.|"
                "what is special about {one}?]",
                "{fact}.",
            ),
            (
                "[can {one} fly?|do {many} fly?]",
                "[yes, {one} can fly|yes, {many} can fly]."
                if animal.flies
                else "[no, {one} cannot fly|no, {many} cannot fly].",
            ),
            (
                "[can {one} swim?|do {many} swim?]",
                "[yes, {one} can swim|yes, {many} can swim]."
                if animal.swims
                else "[no, {one} does not like to swim|no, {many} do not like to swim].",
            ),
        )
    )
    return fill(rng, question, fields), answer_text(rng, (fill(rng, reply, fields),))
