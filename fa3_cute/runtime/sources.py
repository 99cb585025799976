"""Hashes of the package's own sources: of what an object is made of, and of the whole package."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@cache
def source_hash() -> str:
    """SHA-256 over the package's Python files in the order of their paths: path ("fa3_cute/..."), NUL, bytes."""
    paths = {f"fa3_cute/{path.relative_to(PACKAGE).as_posix()}": path for path in PACKAGE.rglob("*.py")}
    digest = hashlib.sha256()
    for name in sorted(name for name, path in paths.items() if path.is_file()):
        digest.update(name.encode() + b"\0" + paths[name].read_bytes())
    return digest.hexdigest()


@cache
def hash_of_imports(*modules: str) -> str:
    """SHA-256 over what these modules of the package ("kernels.forward.kernel") import of it, and they themselves.

    The imports are read off the sources, statements inside of functions too, until nothing new is found. So a kernel's
    hash changes with every file that can change its code and with no other: not with the commands, the launch, the
    rules for a call, or another kernel. Packages' __init__.py count where they are imported by name only: importing a
    module runs them, but what they hold is for users of the package.
    """
    found: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        path = _path(module)
        if module in found or path is None:
            continue
        found[module] = path.read_bytes()
        waiting += _imports(module, path.name == "__init__.py", found[module])
    digest = hashlib.sha256()
    for module in sorted(found):
        digest.update(module.encode() + b"\0" + found[module])
    return digest.hexdigest()


def _path(module: str) -> Path | None:
    """The file of a module; None where the name is that of something in a module."""
    base = PACKAGE.joinpath(*module.split("."))
    candidates = (base.with_name(f"{base.name}.py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _imports(module: str, is_package: bool, source: bytes) -> Iterator[str]:
    """What a module imports from the package, modules and names in them alike. The package itself imports relatively,
    which a test makes sure of."""
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = module.split(".")
            base = [*parts[: len(parts) - node.level + is_package], *(node.module or "").split(".")]
            base = [part for part in base if part]
            if base:
                yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements in a node at any depth; not what they are made of, which takes longer than all else here."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield child
            yield from _statements(child)
