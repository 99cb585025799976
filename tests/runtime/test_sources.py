"""Which sources a kernel is made of: what its module and the compiler's import, and nothing else."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from fa3_cute.planning.decode_append import appending
from fa3_cute.planning.tables import KeySource, decode_config, forward_config
from fa3_cute.runtime import compiler, sources

KERNEL = "kernels/forward/kernel.py"
FILES = {
    KERNEL: "from ..common.tiles import Tile\nfrom . import load\nfrom ...planning import config as settings",
    "kernels/forward/load.py": "def trace():\n    if True:\n        from ..common import tma",
    "kernels/forward/__init__.py": "",
    "kernels/common/tiles.py": "Tile = int",
    "kernels/common/tma.py": "try:\n    from .late import x\nexcept ImportError:\n    pass",
    "kernels/common/late.py": "x = 1",
    "planning/config.py": "from ..contract.formats import FP8",
    "contract/formats.py": "FP8 = 1",
    "kernels/decode/kernel.py": "from ..common.tiles import Tile",
    "cli/bench.py": "from ..kernels.forward import kernel",
    "api.py": "",
    "__init__.py": "",
}
OF_THE_KERNEL = {KERNEL} | {name for name in FILES if name.split("/")[0] in ("kernels", "planning", "contract")} - {
    "kernels/decode/kernel.py"
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in place of ours."""
    for name, content in FILES.items():
        path = tmp_path / "fa3_cute" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(sources, "PACKAGE", tmp_path / "fa3_cute")
    return tmp_path / "fa3_cute"


def of_kernel() -> str:
    return sources.hash_of_imports.__wrapped__("kernels.forward.kernel")


@pytest.mark.parametrize("name", FILES)
def test_a_kernels_hash_changes_with_what_it_is_made_of_only(name, package):
    before = of_kernel()
    path: Path = package / name
    path.write_text(path.read_text() + "\n# another comment")
    assert (of_kernel() != before) == (name in OF_THE_KERNEL)


@pytest.mark.parametrize("name", FILES)
def test_source_hash_covers_every_source(name, package):
    before = sources.source_hash.__wrapped__()
    (package / name).write_text("# other")
    assert sources.source_hash.__wrapped__() != before


def test_the_package_imports_itself_relatively():
    """What the hash follows."""
    for path in sources.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "fa3_cute" for alias in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert node.level or (node.module or "").split(".")[0] != "fa3_cute", path


def test_the_kernels_keys_cover_their_folders_and_no_command(monkeypatch):
    read = set()
    path_of = sources._path
    monkeypatch.setattr(sources, "_path", lambda module: read.add(module) or path_of(module))
    monkeypatch.setattr(compiler, "hash_of_imports", sources.hash_of_imports.__wrapped__)
    leftpad = KeySource(True, has_leftpad=True)
    for cfg in (forward_config("bf16", 64, "causal", True, False), decode_config("bf16", 64, True)):
        compiler.cache_key(cfg)
        compiler.cache_key(replace(cfg, mask_mod="name_0"))
    compiler.cache_key(forward_config("bf16", 64, "causal", True, True, source=leftpad))
    compiler.cache_key(decode_config("bf16", 64, True, source=leftpad))
    compiler.cache_key(appending(decode_config("bf16", 64, True, source=KeySource(True)), "", ""))
    files = {path_of(module) for module in read} - {None}
    folders = [sources.PACKAGE / "kernels" / name for name in ("common", "decode", "forward")]
    kernels = {path for folder in folders for path in folder.glob("*.py") if path.name != "__init__.py"}
    assert kernels <= files
    assert not {path for path in files if path.relative_to(sources.PACKAGE).parts[0] in ("cli", "arrays")}
    assert sources.PACKAGE / "runtime" / "build.py" in files and sources.PACKAGE / "runtime" / "launch.py" not in files
