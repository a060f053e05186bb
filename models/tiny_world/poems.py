"""Short poems with rhymes."""

import random

from tiny_world.cast import ANIMALS, PLACES, THINGS_ALIVE
from tiny_world.phrasing import fill

_KNOWN = {
    "the moon": (
        "The moon looks down on field and hill,\nthe wind is soft, the world is still.\n"
        "It paints the [river|valley] silver white\nand keeps us company all night."
    ),
    "the sea": (
        "The sea is wide, the sea is deep,\nit sings the [little fish|sailors] to sleep.\n"
        "It comes and goes, it goes and stays,\nand hums its song through all our days."
    ),
    "the sun": (
        "The sun gets up, the day is new,\nthe grass is wet with morning dew.\n"
        "It warms the [fields|hills], it warms the sea,\nand shares its light with you and me."
    ),
    "rain": (
        "The rain is tapping on the roof,\nas light as any pony's hoof.\n"
        "It fills the [river|pond], it feeds the tree,\nand sings a quiet song to me."
    ),
    "snow": (
        "The snow came down without a sound\nand laid a blanket on the ground.\n"
        "The [hills|fields] are white, the sky is grey,\nand all the children run to play."
    ),
    "the stars": (
        "The stars are lamps that shine so far,\nI make a wish on every star.\n"
        "They watch the [sleeping|quiet] world below\nand guide us where we want to go."
    ),
    "spring": (
        "The snow is gone, the buds are green,\nthe [brightest|clearest] sky we have ever seen.\n"
        "The birds come back, the flowers wake,\nand ducks are swimming on the lake."
    ),
    "winter": (
        "The days are short, the nights are long,\nthe wind is singing its cold song.\n"
        "But by the fire we sit and [stay|play],\nand winter slowly goes away."
    ),
    "a friend": (
        "A friend is there when skies are grey,\na friend will never run away.\n"
        "We share our bread, we share our [song|road],\nand carry each the other's load."
    ),
    "the night": (
        "The night is dark, the night is deep,\nthe [houses|flowers] all have gone to sleep.\n"
        "One little light is burning still,\nthe moon above the silent hill."
    ),
    "a tree": (
        "A tree stands tall beside the way\nand gives its shade on a sunny day.\n"
        "It holds the [nest|birds], it holds the breeze,\nthere is nothing kinder than the trees."
    ),
    "love": (
        "Love is a lamp, love is a song,\nit makes the [weak|small] feel very strong.\n"
        "It asks for little, gives a lot,\nand stays when other things do not."
    ),
}
_ANY = (
    "I met {one} along the way,\nupon a bright and windy day.\n"
    '"Good morning," said the {name} to me,\n"come sit with me [beside the sea|below this tree]."',
    "The little {name} [looked up|sat down] and said:\n"
    '"The evening sky is turning red.\nThe day was long, the day was bright,\n'
    'and now I wish you all good night."',
    "There lives {one}, so I am told,\nwith [heart|dreams] of silver and of gold.\n"
    "It sings at morning, sings at night,\nand fills the world with warm, soft light.",
)


def poem_exchange(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        topic = rng.choice(sorted(_KNOWN))
        text = fill(rng, _KNOWN[topic])
    else:
        name = rng.choice(ANIMALS + THINGS_ALIVE)
        topic = fill(rng, f"a {name}")
        topic = topic[0].lower() + topic[1:]
        text = fill(rng, rng.choice(_ANY), {"name": name, "one": topic})
    question = fill(
        rng,
        "[write|write me|tell me|please write|can you write] a [|short |little ]poem about {topic}",
        {"topic": topic},
    )
    return question, text


def scene_exchange(rng: random.Random) -> tuple[str, str]:
    """A few sentences that describe a place."""
    place = rng.choice(PLACES)
    text = " ".join(
        fill(rng, sentence, {"place": place})
        for sentence in (
            "it is [early morning|a quiet evening|a warm afternoon|a cold, clear night] {place}.",
            "[the air smells of flowers and wet earth|a soft wind moves the leaves|everything is "
            "still|small birds are singing].",
            "[far away a dog is barking|somewhere a bell is ringing|"
            "water is running over the stones|an owl calls from a tree].",
            "[a little light falls through the clouds|the sky is red and golden|the first star is "
            "shining], and [nobody is in a hurry|the world is at peace|it is good to be here].",
        )
    )
    question = fill(
        rng,
        "[describe a scene|write a few sentences about life|describe a day|tell me what it is like|"
        "paint a picture with words of a day] {place}",
        {"place": place},
    )
    return question, text
