"""Modules, configs, files and headings that the documents name are there; the README lists every module."""

import re
from pathlib import Path

import pytest

from fa3_cute.planning.selections import backward_configs, mla_configs
from fa3_cute.planning.tables import all_decode_configs, all_forward_configs

ROOT = Path(__file__).resolve().parents[2]
README, PACKAGE = ROOT / "README.md", ROOT / "fa3_cute"
CONTRACT = PACKAGE / "kernels" / "README.md"
API = ROOT / "docs" / "api.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), CONTRACT, *(ROOT / "docs").glob("*.md")])

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_layer_table_has_every_kernel_file():
    table = CONTRACT.read_text().partition("## Layers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \d [^|]*\| ([^|]*) \|", table, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"\w+\.py", row)]
    assert set(listed) == {path.name for path in CONTRACT.parent.rglob("*.py") if path.name != "__init__.py"}


def test_readme_layout_has_every_module_outside_kernels_and_cli():
    """Whatever moves or is new there has its line; what a document links to is found in the same place."""
    assert layout_in(README.read_text()) == modules_of_rooms()


@pytest.mark.parametrize(
    "old, new",
    [("  splits.py  ", "  split.py  "), ("planning/\n  problem", "plans/\n  problem"), ("  cubin.py  ", "  the cubin")],
)
def test_a_wrong_layout_is_found(old, new):
    text = README.read_text()
    assert old in text and layout_in(text.replace(old, new)) != modules_of_rooms()


ROOMS = ("jax", "torch", "arrays", "runtime", "planning", "contract")


def modules_of_rooms() -> set[tuple[str, str]]:
    return {(room, path.name) for room in ROOMS for path in (PACKAGE / room).glob("[a-z]*.py")}


def layout_in(text: str) -> set[tuple[str, str]]:
    """(folder, module) of the list of modules, but for the kernels'."""
    modules = text.partition("The modules:\n\n```\n")[2].partition("```")[0]
    found, folder = set(), ""
    for line in modules.splitlines():
        folder = line.rstrip("/") if line[:1].strip() else folder
        found |= {(folder, name) for name in re.findall(r"\b\w+\.py\b", line)}
    return {row for row in found if row[0] != "kernels"}


def test_readme_links_every_example():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(
        re.findall(r"\]\(examples/([^)]*)\)", README.read_text())
    )


@every_document
def test_names_with_a_module_exist(document):
    """What a document calls `module.name` or `module.py`, of the package's own modules, is there."""
    modules: dict[str, str] = {}  # by name; a name that several folders have stands for the texts of all of them
    for path in PACKAGE.rglob("[a-z]*.py"):
        if path.stem not in ("params", "flash_attn"):  # what a call is given; flash-attn's own package
            modules[path.stem] = modules.get(path.stem, "") + path.read_text()
    words = re.findall(
        r"`(\w+)\.(\w+)[\w.]*`", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
    missing = [
        f"{module}.{name}"
        for module, name in words
        if module in modules and name not in ("py", "md") and not re.search(rf"\b{name}\b", modules[module])
    ]
    assert not missing


def absent_config_names(text: str) -> set[str]:
    """What a document calls `cfg.name` and no config has."""
    configs = (all_forward_configs()[0], all_decode_configs()[0], mla_configs()[0], backward_configs()[0])
    return {name for name in re.findall(r"`cfg\.(\w+)", text) if not any(hasattr(cfg, name) for cfg in configs)}


@every_document
def test_config_names_exist(document):
    assert not absent_config_names(document.read_text())


def test_an_absent_config_name_is_found():
    assert absent_config_names("`cfg.tile_m`, `cfg.is_fast`") == {"is_fast"}


def absent_paths(text: str) -> list[str]:
    """Paths like `planning/tables.py` that lead to no file, from the package, the kernels, the tests or the root; names
    without a folder that no module has."""
    known = [path for folder in (PACKAGE, ROOT / "tests", ROOT / "examples") for path in folder.rglob("*.py")]
    return [
        name
        for name in re.findall(r"`([\w/]+\.py)`", text)
        if not any(f"/{path}".endswith(f"/{name}") for path in known)
    ]


@every_document
def test_modules_by_path_exist(document):
    assert not absent_paths(document.read_text())


@pytest.mark.parametrize("name", ["mainloop.py", "common/load.py", "planning/heuristics.py"])
def test_an_absent_module_is_found(name):
    assert absent_paths(f"see `{name}` and `planning/tables.py`") == [name]


# ---- links -----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Those that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path, text: str) -> list[str]:
    links = re.findall(r"\]\((?!\w+:)([^)]*)\)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or anchor and anchor not in anchors(text if not name else target.read_text()):
            broken.append(link)
    return broken


@every_document
def test_relative_links_resolve(document):
    assert not broken_links(document, document.read_text())


@pytest.mark.parametrize("link", ["[x](nothing.md)", "[x](#nothing)", "[x](api.md#nothing)", "[x](../docs/no/api.md)"])
def test_a_broken_link_is_found(link):
    assert broken_links(API, API.read_text() + link)
