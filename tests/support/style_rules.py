"""The house rules that a machine can check. A rule takes a Source and yields (line, sentence) for every breach."""

import ast
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fa3_cute"

MAX_FILE, MAX_PARAMETERS, MAX_NESTING = 400, 8, 3
MAX_FUNCTION, MAX_FUNCTION_ELSEWHERE = 60, 80  # of the package; of tests and examples

# From the ground up: a folder's modules may import those of their own folder and of the folders before it. "" is the
# package's own __init__.py. The command line uses the package as anyone does, hence its place at the end.
FRAMEWORK_ROOMS = "torch", "huggingface", "jax"
FOLDERS = ("contract", "planning", "kernels", "runtime", "arrays", "api", *FRAMEWORK_ROOMS, "", "cli", "__main__")
# Of the folders within kernels/: which of them a module there may import.
KINDS = "forward", "decode", "merge", "backward", "append"
KERNELS = {"common": {"common"}, **{kind: {"common", kind} for kind in KINDS}, "mla": {"common", "decode", "mla"}}
FRAMEWORKS = {"torch", "cupy", "jax", "tensorflow", "triton"}
DEVICE = {"cutlass", "cuda"}
# What a folder may not import. A call's meaning and its plan are known where there is neither the DSL nor CUDA.
BANNED = {
    "torch": FRAMEWORKS - {"torch"} | DEVICE,
    "huggingface": FRAMEWORKS - {"torch"} | DEVICE,
    "jax": FRAMEWORKS - {"jax"} | DEVICE,
    "contract": FRAMEWORKS | DEVICE,
    "planning": FRAMEWORKS | DEVICE,
    "kernels": FRAMEWORKS | {"numpy", "ctypes", "os", "subprocess"},
}
PIPELINE_STATE = re.compile(r"\b(PipelineState|\w*Producer|\w*Consumer)\b")

# Signatures fixed from outside: attention() has flash-attn's names, the adapter's methods are vLLM's.
WIDE_SIGNATURES = {("api", "attention")} | {
    ("torch.flash_attn", name) for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
}
WIDE_SIGNATURES |= {("vllm_backend", name) for name in ("supports_combination", "__init__", "forward")}


@dataclass(frozen=True)
class Source:
    """One source file: its path and its text."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def module(self) -> str:
        """ "cli.bench" for cli/bench.py, "cli" for cli/__init__.py, "" for the package's own __init__.py."""
        if PACKAGE not in self.path.parents:
            return self.path.stem
        parts = self.path.relative_to(PACKAGE).with_suffix("").parts
        return ".".join(parts[:-1] if self.is_package else parts)

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def nodes(self, *kinds) -> list:
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]


def project_imports(source: Source):
    """(line, module) of every import of the package's own modules, at any depth of the source."""
    package = source.module.split(".") if source.module else []
    if not source.is_package:
        package = package[:-1]
    for node in source.nodes(ast.Import):
        names = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == "fa3_cute"]
        yield from ((node.lineno, owner(name)) for name in names)
    for node in source.nodes(ast.ImportFrom):
        names = node.module.split(".") if node.module else []
        if node.level:
            names = [*package[: len(package) + 1 - node.level], *names]
        elif names[0] == "fa3_cute":
            names = names[1:]
        else:
            continue
        yield from ((node.lineno, owner([*names, alias.name])) for alias in node.names)


def owner(names: list[str]) -> str:
    """The module that a dotted name lies in: itself if it is one ("cli.bench"), else what is before the last dot."""
    path = PACKAGE.joinpath(*names)
    is_module = path.with_suffix(".py").exists() or path.is_dir()
    return ".".join(names if is_module else names[:-1])


def layering(source: Source):
    """Imports go one way: down the folders; in kernels/, forward and decode know common and not one another, and mla is
    a kind of decode."""
    if source.top not in FOLDERS:
        yield 1, f"{source.module}: no such folder in FOLDERS"
        return
    for line, module in project_imports(source):
        top = module.partition(".")[0]
        if top not in FOLDERS:
            yield line, f"{module}: no such folder in FOLDERS"
        elif FOLDERS.index(top) > FOLDERS.index(source.top):
            yield line, f"{source.module} imports {module or 'fa3_cute'}, which lies above it"
        elif source.top == top == "kernels" and not knows(kernels_folder(source.module), kernels_folder(module)):
            yield line, f"{source.module} must not know {module}"


def knows(here: str, there: str) -> bool:
    """Whether a folder of kernels/ may import another; the folders themselves have nothing to import."""
    return there in KERNELS.get(here, ())


def kernels_folder(module: str) -> str:
    """ "common" of "kernels.common.tma"."""
    return module.split(".")[1] if "." in module else ""


def foreign_imports(source: Source):
    """No array framework in the package, the benchmark's peers excepted; no host library in device code; no DSL and no
    CUDA in what a call means and how it is planned."""
    banned = BANNED.get(source.top, FRAMEWORKS)
    if source.module in ("cli.peers", "cli.wrappers"):
        return
    for node in source.nodes(ast.Import, ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if getattr(node, "level", 0) == 0:
            yield from ((node.lineno, f"imports {name}") for name in names if name.split(".")[0] in banned)


def frozen_pipeline_state(source: Source):
    """Pipeline state in a frozen dataclass compiles, and never advances."""
    for node in source.nodes(ast.ClassDef):
        if not is_dataclass(node, frozen=True):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and PIPELINE_STATE.search(ast.unparse(field.annotation)):
                yield field.lineno, f"{node.name}.{ast.unparse(field.target)}: pipeline state in a frozen bundle"


def loop_in_state_method(source: Source):
    """A run-time loop in a method of mutable state compiles, and freezes that state: role functions hold such loops."""
    if source.top != "kernels":
        return
    for node in source.nodes(ast.ClassDef):
        if not is_dataclass(node, frozen=False):
            continue
        for method in (item for item in node.body if isinstance(item, ast.FunctionDef)):
            yield from (
                (loop.lineno, f"{node.name}.{method.name}: run-time loop in a state method")
                for loop in ast.walk(method)
                if is_run_time_loop(loop)
            )


def phase(source: Source):
    """The DSL's handles own the pipeline phase: device code never spells it."""
    if source.top == "kernels":
        yield from (
            (number, "the word 'phase'")
            for number, line in enumerate(source.text.splitlines(), 1)
            if "phase" in line.lower()
        )


def docstrings(source: Source):
    """Every module and every device function says what it is for."""
    if source.text.strip() and not ast.get_docstring(source.tree):
        yield 1, "no module docstring"
    for function in source.nodes(ast.FunctionDef):
        traced = any(text.startswith(("cute.jit", "cute.kernel", "dsl_user_op")) for text in decorators(function))
        if traced and not ast.get_docstring(function):
            yield function.lineno, f"{function.name}: device function without a docstring"


def sizes(source: Source):
    """Files, functions, parameter lists and nesting that a reader can hold in mind."""
    if (lines := source.text.count("\n")) > MAX_FILE:
        yield lines, f"{lines} lines, at most {MAX_FILE}"
    max_function = MAX_FUNCTION if PACKAGE in source.path.parents else MAX_FUNCTION_ELSEWHERE
    for function in source.nodes(ast.FunctionDef):
        is_wide = (source.module, function.name) in WIDE_SIGNATURES
        start = function.body[0].lineno if is_wide else function.lineno
        measured = (
            ("lines", function.end_lineno - start + 1, max_function),
            ("parameters", parameter_count(source, function), MAX_PARAMETERS),
            ("levels of nesting", nesting(function), MAX_NESTING),
        )
        yield from (
            (function.lineno, f"{function.name}: {size} {what}, at most {limit}")
            for what, size, limit in measured
            if size > limit
        )


RULES = (layering, foreign_imports, frozen_pipeline_state, loop_in_state_method, phase, docstrings, sizes)


def decorators(node) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def is_dataclass(node: ast.ClassDef, frozen: bool) -> bool:
    texts = [text for text in decorators(node) if "dataclass" in text]
    return bool(texts) and frozen == any("frozen=True" in text for text in texts)


def is_run_time_loop(node: ast.AST) -> bool:
    return isinstance(node, ast.While) or isinstance(node, ast.For) and "range_constexpr" not in ast.unparse(node.iter)


def parameter_count(source: Source, function: ast.FunctionDef) -> int:
    if (source.module, function.name) in WIDE_SIGNATURES:
        return 0
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def nesting(node: ast.AST) -> int:
    """Depth of decisions within decisions, taken at run time: `with` and `if const_expr(...)` do not count.

    An `elif` stands beside its `if`; a nested function starts again.
    """
    deepest = 0
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                continue
            is_elif = isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If) and len(value) == 1
            deepest = max(deepest, nesting(child) + (is_decision(child) and not is_elif))
    return deepest


def is_decision(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return not ast.unparse(node.test).startswith(("const_expr(", "cutlass.const_expr("))
    return isinstance(node, (ast.For, ast.While, ast.Try))
