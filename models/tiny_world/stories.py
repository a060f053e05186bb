"""Stories: a cast, a plot, an opening and an ending."""

import random
from dataclasses import dataclass

from tiny_world import plots
from tiny_world.cast import (
    ANIMALS,
    FEMALE_KINDS,
    FEMALE_NAMES,
    MALE_KINDS,
    MALE_NAMES,
    NATURES,
    PEOPLE,
    THINGS_ALIVE,
    Cast,
    cast,
    favourites,
)
from tiny_world.phrasing import capital, fill, invented_word, sentence_case, with_article
from tiny_world.plots import PLOTS, Plot

ASKING = (
    "[tell me a|tell me a|tell me a|please tell me a|can you tell me a|could you tell me a|tell a|"
    "write a|write a|write me a|I want a|give me a|make up a|do you know a|] "
    "[|||short |little |bedtime |nice |very short ]story about {topic}"
)
ASKING_FOR_ANY = (
    "[tell me|please tell me|can you tell me|write|write me|I would like|give me] "
    "a [|short |bedtime |nice |new ]story"
)


@dataclass(frozen=True, slots=True)
class Story:
    request: str
    text: str
    cast: Cast
    plot: Plot


def any_kind(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.6:
        return rng.choice(ANIMALS)
    if roll < 0.78:
        return rng.choice(PEOPLE)
    if roll < 0.9:
        return rng.choice(THINGS_ALIVE)
    return invented_word(rng)


def any_name(rng: random.Random, kind: str) -> str:
    if kind in FEMALE_KINDS:
        return rng.choice(FEMALE_NAMES)
    return rng.choice(MALE_NAMES if kind in MALE_KINDS else FEMALE_NAMES + MALE_NAMES)


def usual_plot(rng: random.Random, kind: str) -> Plot:
    if rng.random() < 0.75:
        index = favourites([str(i) for i in range(len(PLOTS))], kind + "?", 2)
        return PLOTS[int(rng.choice(index))]
    return rng.choice(PLOTS)


def told(rng: random.Random, who: Cast, plot: Plot, fields: dict[str, str]) -> str:
    sentences = [rng.choice(plots.OPENINGS), *plot.scenes]
    if rng.random() < 0.5:
        sentences.append(rng.choice(plots.ENDINGS))
    else:
        sentences.append(f"[and so {{hero}} learned that|{{hero}} learned that] {plot.lesson}.")
    return sentence_case(" ".join(fill(rng, sentence, fields) for sentence in sentences))


def story(rng: random.Random, kind: str | None = None) -> Story:
    """A story somebody asked for; what the request names is in the story."""
    plot: Plot | None = None
    roll = rng.random()
    hero: str | None = None
    nature: str | None = None
    friend_kind: str | None = None
    topic: str | None = None
    if kind is not None or roll < 0.5:
        kind = kind or any_kind(rng)
        topic = with_article(kind)
        if rng.random() < 0.2:
            nature = rng.choice(NATURES)
            topic = with_article(f"{nature} {kind}")
        if rng.random() < 0.2:
            friend_kind = rng.choice([a for a in ANIMALS if a != kind])
            topic += " and " + with_article(friend_kind)
        elif rng.random() < 0.2:
            hero = any_name(rng, kind)
            topic += f" [named|called] {hero}"
    elif roll < 0.6:
        kind = any_kind(rng)
        hero = any_name(rng, kind)
        topic = f"{hero} the {kind}"
    elif roll < 0.82:
        plot = rng.choice(PLOTS)
        kind = usual_kind(rng, plot)
        topic = plot.topic
    elif roll < 0.93:
        plot = rng.choice(PLOTS)
        kind = any_kind(rng)
        topic = f"{with_article(kind)} [who|that] {plot.deed}"
    else:
        kind = any_kind(rng)
    who = cast(rng, kind, hero, nature, friend_kind)
    plot = plot or usual_plot(rng, kind)
    fields = who.fields(rng)
    if topic is None:
        request = fill(rng, ASKING_FOR_ANY)
    else:
        request = capital(fill(rng, ASKING, {"topic": fill_topic(rng, topic, fields)}).strip())
    return Story(request, told(rng, who, plot, fields), who, plot)


def fill_topic(rng: random.Random, topic: str, fields: dict[str, str]) -> str:
    text = fill(rng, topic, fields)
    return text if text.split()[0] in FEMALE_NAMES + MALE_NAMES else text[0].lower() + text[1:]


def usual_kind(rng: random.Random, plot: Plot) -> str:
    if rng.random() < 0.7:
        return rng.choice(favourites(ANIMALS, plot.lesson, 3))
    return rng.choice(ANIMALS + PEOPLE)


def follow_up(rng: random.Random, told_story: Story) -> tuple[str, str]:
    """A question about a story just told, with its answer."""
    who = told_story.cast
    fields = who.fields(rng)
    question, reply = rng.choice(
        (
            (
                "what was the name of the {kind}?|what was the {kind} called?|"
                "who was the story about?",
                "the {kind} was named {hero}.|the story was about {hero}, {a_nature} {kind}.",
            ),
            (
                "who was the {fkind}?|what was the name of the {fkind}?|who was {hero}'s friend?",
                "the {fkind} was named {friend}.|{friend} the {fkind} was {hero}'s friend.",
            ),
            (
                "where did {hero} live?|where did the {kind} live?",
                "{hero} lived {place}.|the {kind} lived {place}.",
            ),
            (
                "what did {hero} learn?|what does the story teach us?|what is the lesson?",
                f"{{hero}} learned that {told_story.plot.lesson}.|"
                f"The story teaches us that {told_story.plot.lesson}.",
            ),
        )
    )
    fields["a_nature"] = with_article(who.nature)
    return fill(rng, f"[{question}]", fields), fill(rng, pick(rng, reply), fields)


def pick(rng: random.Random, alternatives: str) -> str:
    """One of the alternatives outside brackets."""
    depth = 0
    parts = [""]
    for char in alternatives:
        depth += {"[": 1, "]": -1}.get(char, 0)
        if char == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return rng.choice(parts)
