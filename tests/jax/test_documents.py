"""docs/jax.md: its snippet runs, and its table has each argument."""

import re
from pathlib import Path

from inputs import qkv

from fa3_cute.jax.calls import OPTIONAL, Choices

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "jax.md").read_text()


def test_the_snippet_runs():
    (code,) = re.findall(r"```py\n(.*?)```", TEXT, re.DOTALL)
    q, k, v = qkv()
    exec(code, names := {"q": q, "k": k, "v": v})
    assert names["out"].shape == q.shape and names["lse"].shape == (2, 4, 24) and names["dk"].shape == k.shape


def test_documented_arguments():
    cells = re.findall(r"^\| ([^|]*`[^|]*) \| yes \|", TEXT, re.MULTILINE)
    documented = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(documented) == sorted(["q", "k", "v", *OPTIONAL, *Choices.__dataclass_fields__])
