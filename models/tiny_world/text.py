"""Reads the words and sentences of the small world from the folder `sentences`."""

from pathlib import Path

FOLDER = Path(__file__).parent / "sentences"

Entry = tuple[tuple[str, ...], tuple[str, ...]]


def lines(name: str) -> tuple[str, ...]:
    return tuple((FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines())


def words(label: str) -> list[str]:
    """The list that stands behind `label:` in words.txt."""
    for line in lines("words"):
        if line.startswith(label + ": "):
            return line.removeprefix(label + ": ").split("|")
    raise KeyError(f"{FOLDER.name}/words.txt: no line {label!r}; add one: {label}: a|b|c")


def entry(line: str) -> Entry:
    """`question|question;sentence;sentence` as questions and sentences."""
    questions, *sentences = line.split(";")
    return tuple(questions.split("|")), tuple(sentences)
