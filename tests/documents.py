"""The Markdown files whose Python is run by tests, by section."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [
    path for folder in (".", "benchmarks", "docs", "docs/api", "examples") for path in ROOT.glob(f"{folder}/*.md")
]


def sections(name: str) -> dict[str, str]:
    """Heading -> text, for every heading of the second level."""
    text = (ROOT / name).read_text()
    return dict(re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def blocks(name: str, section: str) -> list[str]:
    """The Python in what comes before the first section, then in this one: a reader needs no more of the document."""
    text = (ROOT / name).read_text()
    return CODE.findall(text[: text.index("\n## ")]) + CODE.findall(sections(name)[section])


def run(blocks: list[str], changes: dict[str, str] | None = None, **names: object) -> dict[str, object]:
    """Run blocks one after the other, with what a reader brings along, and return all names.

    ``changes`` is what is written otherwise, models in small as a rule; the text has to be there.
    """
    code = "\n".join(blocks)
    for before, after in (changes or {}).items():
        assert before in code
        code = code.replace(before, after)
    exec(code, names)
    return names
