"""Who a story is about, where it happens, and the words that name them."""

import random
import zlib
from dataclasses import dataclass

from tiny_world.text import words

ANIMALS = words("animals")
PEOPLE = words("people")
THINGS_ALIVE = words("things alive")
FEMALE_NAMES = words("female names")
MALE_NAMES = words("male names")
FEMALE_KINDS = frozenset(("girl", "queen", "princess", "grandmother", "hen", "cow"))
MALE_KINDS = frozenset(("boy", "king", "prince", "grandfather", "fisherman", "snowman"))
NATURES = words("natures")
PLACES = words("places")
TREASURES = words("treasures")
COLOURS = words("colours")
FOODS = words("foods")


@dataclass(frozen=True, slots=True)
class Cast:
    hero: str
    kind: str
    nature: str
    female: bool
    friend: str
    friend_kind: str
    friend_female: bool
    place: str

    def fields(self, rng: random.Random) -> dict[str, str]:
        """The fields of a story's patterns; things and foods are drawn here, once a story."""
        colour = rng.choice(COLOURS)
        return {
            "hero": self.hero,
            "kind": self.kind,
            "nature": self.nature,
            "he": "she" if self.female else "he",
            "him": "her" if self.female else "him",
            "his": "her" if self.female else "his",
            "friend": self.friend,
            "fkind": self.friend_kind,
            "fhe": "she" if self.friend_female else "he",
            "fhim": "her" if self.friend_female else "him",
            "fhis": "her" if self.friend_female else "his",
            "place": self.place,
            "thing": rng.choice(TREASURES),
            "colour": colour,
            "food": rng.choice(FOODS),
        }


def favourites(options: list[str], word: str, count: int) -> list[str]:
    """A few of the options, always the same for one word, so that each kind has its own world."""
    start = zlib.crc32(word.encode())
    return [options[(start + 7 * i) % len(options)] for i in range(count)]


def usual(rng: random.Random, options: list[str], word: str) -> str:
    return rng.choice(favourites(options, word, 2) if rng.random() < 0.7 else options)


def cast(
    rng: random.Random,
    kind: str,
    hero: str | None = None,
    nature: str | None = None,
    friend_kind: str | None = None,
) -> Cast:
    female = rng.random() < 0.5 if hero is None else hero in FEMALE_NAMES
    if hero is None:
        if kind in FEMALE_KINDS | MALE_KINDS:
            female = kind in FEMALE_KINDS
        else:
            female = usual(rng, ["f", "m"], kind) == "f"
        hero = usual(rng, FEMALE_NAMES if female else MALE_NAMES, kind)
    if friend_kind is None:
        friend_kind = usual(rng, [a for a in ANIMALS if a != kind], kind + "'s friend")
    friend_female = friend_kind not in MALE_KINDS and (
        friend_kind in FEMALE_KINDS or rng.random() < 0.5
    )
    names = FEMALE_NAMES if friend_female else MALE_NAMES
    friend = usual(rng, [name for name in names if name != hero], friend_kind + hero)
    return Cast(
        hero=hero,
        kind=kind,
        nature=nature or usual(rng, NATURES, kind),
        female=female,
        friend=friend,
        friend_kind=friend_kind,
        friend_female=friend_female,
        place=usual(rng, PLACES, kind),
    )
