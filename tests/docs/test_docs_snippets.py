"""The snippets of docs/adding-a-feature.md are lines of the files that they name, in their order."""

import re
from pathlib import Path

import pytest
from documents import ROOT, blocks

GUIDE = ROOT / "docs" / "adding-a-feature.md"


def lines_of(text: str) -> list[str]:
    """The lines of code, without indentation and comments behind two spaces."""
    return [re.sub(r"  #.*", "", line).strip() for line in text.splitlines() if line.strip()]


def strange_lines(text: str) -> list[str]:
    """The first line of each snippet that the file named in its comment does not have behind the lines before."""
    found = []
    for block in blocks(text, "python"):
        name, *snippet = lines_of(block)
        code = iter(lines_of(Path(ROOT, name.removeprefix("# ")).read_text()))
        found += [line for line in snippet if line not in code][:1]
    return found


def test_snippets_are_the_code_s():
    assert len(blocks(GUIDE.read_text(), "python")) >= 5
    assert not strange_lines(GUIDE.read_text())


@pytest.mark.parametrize(
    "old, new",
    [("tanh(score * scale)", "tanh(scale * score)"), ('_optional("bytes", 2)', '_optional("bytes", 4)')],
)
def test_a_snippet_that_is_not_is_found(old, new):
    text = GUIDE.read_text()
    assert old in text and len(strange_lines(text.replace(old, new, 1))) == 1
