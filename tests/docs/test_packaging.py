"""What a user meets first: the top level, the metadata, make's targets, the README's promises."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from fa3_cute.cli import report
from fa3_cute.contract.status import Status

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OF_THE_REPOSITORY = {".ci"}  # and not of the source distribution
TOP_LEVEL = OF_THE_REPOSITORY | {
    ".editorconfig",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "docs",
    "examples",
    "fa3_cute",
    "pyproject.toml",
    "tests",
    "typings",
}
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_top_level():
    assert {path.name for path in ROOT.iterdir()} >= TOP_LEVEL - OF_THE_REPOSITORY
    listed = (
        subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        if shutil.which("git")
        else None
    )
    if listed is None or listed.returncode:
        pytest.skip("not a git checkout: what else lies here is nobody's claim")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == TOP_LEVEL


def test_dependencies():
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    names = {name_of(requirement) for requirement in PROJECT["project"]["dependencies"]}
    assert names == {"nvidia-cutlass-dsl", "cuda-python", "cuda-core", "numpy"}
    # vLLM and SGLang pin 4.8.0: both can be installed beside this package.
    assert "nvidia-cutlass-dsl>=4.8.0,<4.9" in PROJECT["project"]["dependencies"]


def test_the_test_extra_has_what_tests_ask_for():
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"test", "dtypes", "plot"} <= extras.keys()
    names = {name_of(requirement) for requirement in extras["test"]}
    assert names >= {name_of(requirement) for extra in ("dtypes", "plot") for requirement in extras[extra]}
    assert names >= {"pytest", "pytest-xdist", "hypothesis", "nvidia-cuda-nvdisasm"}


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def test_installed_metadata_is_this_project():
    try:
        installed = metadata.distribution("fa3_cute")
    except metadata.PackageNotFoundError:
        pytest.skip("run from the sources, not installed")
    import fa3_cute

    assert installed.version == PROJECT["project"]["version"] == fa3_cute.__version__
    (command,) = (entry for entry in installed.entry_points if entry.name == "fa3-cute")
    assert command.load() is __import__("fa3_cute.cli", fromlist=["main"]).main


def test_source_distribution_has_the_top_level():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {path.removeprefix("/") for path in included} | {"pyproject.toml"} == TOP_LEVEL - OF_THE_REPOSITORY


def test_type_checkers_see_the_public_names():
    """py.typed is there, and the names under TYPE_CHECKING come from where __getattr__ fetches them."""
    import fa3_cute

    assert (ROOT / "fa3_cute" / "py.typed").exists()
    assert declared((ROOT / "fa3_cute" / "__init__.py").read_text()) == fa3_cute._MODULE_OF


@pytest.mark.parametrize("old, new", [("        explain,\n", ""), ("from .contract.quantize", "from .api")])
def test_a_wrong_declaration_is_found(old, new):
    import fa3_cute

    text = (ROOT / "fa3_cute" / "__init__.py").read_text()
    assert old in text and declared(text.replace(old, new)) != fa3_cute._MODULE_OF


def declared(text: str) -> dict[str, str]:
    """Name -> module of the imports under `if TYPE_CHECKING:`."""
    (block,) = (node for node in ast.parse(text).body if isinstance(node, ast.If))
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_importing_the_package_fetches_no_module():
    code = "import sys, fa3_cute; print(*(name for name in sys.modules if name.startswith('fa3_cute')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fa3_cute"]


def test_changelog_has_this_version_and_what_comes():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", PROJECT["project"]["version"]]


def test_pre_commit_runs_the_lint():
    assert re.findall(r"^ +entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE) == ["make lint"]


def test_make_targets():
    """Each of them first makes the environment; what else it would run parses."""
    if not shutil.which("make"):
        pytest.skip("no make here")
    for target in ("demo", "test", "test-gpu", "lint", "bench", "clean"):
        subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, check=True)


def test_ci_script():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("a source distribution, which has no .ci")
    assert script.stat().st_mode & 0o111, "not executable"
    subprocess.run(["bash", "-n", script], check=True)
    assert re.findall(r"^make .*$", script.read_text(), re.MULTILINE) == ["make test", "make lint"]


def test_license():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "BSD-3-Clause"
    assert text.startswith("BSD 3-Clause License") and "The fa3_cute authors" in text


def test_readme_table_has_every_status_in_order():
    rows = re.findall(r"^\| (0|-\d+) \| (\w+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [(int(status), status.name) for status in Status]


def test_readme_first_screen():
    first_screen = (ROOT / "README.md").read_text().splitlines()[:40]
    assert {"make demo", "make test"} <= {line.split("  ")[0] for line in first_screen}
    assert "forward(params, stream)" in "\n".join(first_screen)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_exist(document):
    targets = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    assert not [target for target in targets if not (document.parent / target).exists()]


def test_readme_modules_exist():
    text = (ROOT / "README.md").read_text()
    layout = text.partition("```\nfa3_cute/")[2].partition("\nexamples/")[0]
    named = re.findall(r"\b\w+\.py\b|\bkernels/README\.md\b|^  \w+/", layout, re.MULTILINE)
    assert len(named) >= 8 and not [name for name in named if not (ROOT / "fa3_cute" / name.strip()).exists()]


def test_readme_example_is_a_valid_call(monkeypatch):
    import fa3_cute

    calls = []
    monkeypatch.setattr(fa3_cute, "forward", lambda params, stream: calls.append(params) or Status.OK)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(
        example,
        {f"{tensor}_ptr": 1 << 20 + number for number, tensor in enumerate(("q", "k", "v", "out"))} | {"stream": 0},
    )
    assert len(calls) == 2 and fa3_cute.explain(calls[0]) == []


@pytest.mark.parametrize("document", [ROOT / "README.md", ROOT / "docs" / "performance.md"], ids=lambda path: path.name)
def test_performance_tables_can_be_replaced(document):
    """`report --into` finds its place in both documents, and each table there says what it was measured on, and how."""
    tables = document.read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    sections = tables.split("### ")[1:]
    assert sections
    for section in sections:
        assert re.search(r"H[12]00.*\d{4}-\d\d-\d\dT", section) and "    python -m fa3_cute bench " in section


def test_performance_names_no_command_but_those_that_were_run():
    """They stand below the tables, indented, as `report` writes them; shell blocks have what a reader may do."""
    text = (ROOT / "docs" / "performance.md").read_text()
    assert text.count("    python -m fa3_cute bench ") >= 5
    assert not re.findall(r"^python -m fa3_cute bench.*", text, re.MULTILINE)


def test_readme_explains_what_its_tables_say():
    before = (ROOT / "README.md").read_text().partition("## Performance\n")[2].partition(report.BEGIN)[0]
    before = " ".join(before.split())
    assert all(word in before for word in ("of peak", "of copy", "time / ours", "with *", "sources", "**us**"))
