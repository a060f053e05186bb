"""The plots of the stories: patterns for what happens, sentence by sentence."""

from dataclasses import dataclass

from tiny_world.text import lines

OPENINGS = lines("openings")
ENDINGS = lines("endings")


@dataclass(frozen=True, slots=True)
class Plot:
    topic: str
    """What a user may call it: Tell me a story about {topic}."""
    deed: str
    """What its hero does: a story about a fox who {deed}."""
    scenes: tuple[str, ...]
    lesson: str


def _plots() -> tuple[Plot, ...]:
    """plots.txt holds one plot a paragraph: its topic, deed, scenes and lesson."""
    paragraphs = "\n".join(lines("plots")).split("\n\n")
    found: list[Plot] = []
    for paragraph in paragraphs:
        topic, deed, *scenes, lesson = paragraph.splitlines()
        found.append(
            Plot(
                topic.removeprefix("topic: "),
                deed.removeprefix("deed: "),
                tuple(scenes),
                lesson.removeprefix("lesson: "),
            )
        )
    return tuple(found)


PLOTS = _plots()
