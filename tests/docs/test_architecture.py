"""docs/architecture.md names every module once, and none that is gone."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "platform" / "expertmesh"


def test_every_module_has_its_line() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text()
    named = re.findall(r"^- `([^`]+\.py)`: \S", text, re.MULTILINE)
    modules = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if file.name not in ("__init__.py", "__main__.py")
    }
    assert sorted(named) == sorted(modules)


def test_the_source_root_is_no_package() -> None:
    assert not (REPOSITORY / "platform" / "__init__.py").exists()


def test_local_links_of_the_readme_lead_somewhere() -> None:
    text = (REPOSITORY / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (REPOSITORY / link).exists()]
    assert links and not missing
