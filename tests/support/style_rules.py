"""The house rules that a machine can check. A rule takes a Source and yields (line, sentence) for every breach."""
import ast
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fa3_cute"

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_NESTING = 400, 80, 8, 3

# From the ground up: a module may import only from lower tiers. A package's name stands for its modules not named here.
TIERS = (
    ("status", "config", "params", "limits", "device", "disk_cache", "cubin", "cuda_driver"),
    ("heuristics", "reference", "workspace"),
    ("splits", "quantize"),
    ("quick_check",),
    ("validate", "arguments"),
    # Words of the device code, then the maths, then the roles, then the kernels.
    ("kernels", "kernels.arithmetic", "kernels.ptx", "kernels.layout", "kernels.barriers", "kernels.cluster",
     "kernels.tma"),
    ("kernels.sequences", "kernels.tiles", "kernels.block_range", "kernels.scheduler", "kernels.transpose"),
    ("kernels.split", "kernels.fp8"),
    ("kernels.params",),
    ("kernels.wgmma", "kernels.mask", "kernels.score_mod", "kernels.softmax"),
    ("kernels.load", "kernels.epilogue"),
    ("kernels.load_fp8", "kernels.schedule", "kernels.merge"),
    ("kernels.mainloop",),
    ("kernels.flash_fwd", "kernels.flash_decode"),
    ("compiler",),
    ("launch", "interop"),
    ("arrays",),
    ("api",),
    ("",),              # fa3_cute/__init__.py
    ("cli",),
    ("__main__",),
)
TIER = {name: number for number, names in enumerate(TIERS) for name in names}
# What a package may not know although it lies lower: device code sees the config and nothing else of the host side, and
# what the kernels mean is defined without them.
STANDS_ALONE = {
    "kernels": {"config", "kernels"},
    "reference": set(),
    "status": set(),
    "config": set(),
}
FRAMEWORKS = {"torch", "cupy", "jax", "tensorflow", "triton"}
HOST_ONLY = {"numpy", "ctypes", "os", "subprocess"}
PIPELINE_STATE = re.compile(r"\b(PipelineState|\w*Producer|\w*Consumer)\b")

# Signatures fixed from outside: a kernel's entry is its config's `arguments`, attention() has flash-attn's names.
WIDE_SIGNATURES = {("kernels.flash_fwd", "__call__"), ("kernels.flash_decode", "__call__"), ("api", "attention")}


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
        """"kernels.mask" for kernels/mask.py, "cli" for cli/__init__.py, "" for the package's own __init__.py."""
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
            names = [*package[:len(package) + 1 - node.level], *names]
        elif names[0] == "fa3_cute":
            names = names[1:]
        else:
            continue
        yield from ((node.lineno, owner([*names, alias.name])) for alias in node.names)


def owner(names: list[str]) -> str:
    """The module that a dotted name lies in: itself if it is one ("kernels.mask"), else what is before the last dot."""
    path = PACKAGE.joinpath(*names)
    is_module = path.with_suffix(".py").exists() or path.is_dir() or ".".join(names) in TIER
    return ".".join(names if is_module else names[:-1])


def tier_name(module: str) -> str:
    """The name in TIERS that holds for a module: its own, else that of the nearest package around it."""
    while module not in TIER and "." in module:
        module = module.rpartition(".")[0]
    return module


def layering(source: Source):
    """Imports go one way: down the tiers."""
    here = tier_name(source.module)
    if here not in TIER:
        yield 1, f"module {source.module} is in no tier"
        return
    for line, module in project_imports(source):
        there = tier_name(module)
        if here == there == "cli":
            continue
        if there not in TIER:
            yield line, f"{module} is in no tier"
        elif not TIER[there] < TIER[here]:
            yield line, f"{here} (tier {TIER[here]}) imports {there or 'fa3_cute'} (tier {TIER[there]})"
        elif there.partition(".")[0] not in STANDS_ALONE.get(source.top, {there.partition(".")[0]}):
            yield line, f"{here} must not know {there}"


def foreign_imports(source: Source):
    """No array framework in the package, the benchmark's peers excepted; no host library in device code."""
    banned = HOST_ONLY | FRAMEWORKS if source.top == "kernels" else FRAMEWORKS
    if source.module == "cli.peers":
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
            yield from ((loop.lineno, f"{node.name}.{method.name}: run-time loop in a state method")
                        for loop in ast.walk(method) if is_run_time_loop(loop))


def phase(source: Source):
    """The DSL's handles own the pipeline phase: device code never spells it."""
    if source.top == "kernels":
        yield from ((number, "the word 'phase'") for number, line in enumerate(source.text.splitlines(), 1)
                    if "phase" in line.lower())


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
    for function in source.nodes(ast.FunctionDef):
        measured = (
            ("lines", function.end_lineno - function.lineno + 1, MAX_FUNCTION),
            ("parameters", parameter_count(source, function), MAX_PARAMETERS),
            ("levels of nesting", nesting(function), MAX_NESTING),
        )
        yield from ((function.lineno, f"{function.name}: {size} {what}, at most {limit}")
                    for what, size, limit in measured if size > limit)


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
