"""A hash of a function's meaning: its source and code, its defaults, and the values of what it refers to.

Equal in every process that has the same function under the same version of Python; functions that differ in any of
this have different ones. What no hash can tell from another (an object with state, a function without source) is
refused unless the caller gives a key, which stands for it. Names that are looked up by text (`globals()["x"]`) are not
seen. Pure Python.
"""

import builtins
import dis
import hashlib
import inspect
import json
import textwrap
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType, ModuleType
from typing import Any

PLAIN = (type(None), bool, int, float, complex, str, bytes, EllipsisType)
# What is known by its name: these change with versions that the cache key has, or not at all.
LIBRARIES = frozenset(("builtins", "cutlass", "math", "numpy", "operator", "typing"))
IMPORT = "import "  # before the name of a module that a function imports itself
ADVICE = "give key=, a text that changes whenever the function comes to mean something else"


class NoHash(ValueError):
    """A function's meaning depends on what has no hash, and there is no key."""


def function_hash(fn: Any, key: str = "") -> str:
    """SHA-256 in hex of a function, plain or decorated with `cute.jit`. Raises NoHash, which says why."""
    return hashlib.sha256(json.dumps(_Description(key).of_function(undecorated(fn))).encode()).hexdigest()


def undecorated(fn: Any) -> Any:
    """The function that `cute.jit` was applied to; any other one is its own."""
    while isinstance(fn, FunctionType) and "_decorator_kind" in vars(fn) and "__wrapped__" in vars(fn):
        fn = vars(fn)["__wrapped__"]
    return fn


class _Description:
    """Of a function, in lists and texts that are the same in every process."""

    def __init__(self, key: str):
        self.key = key
        self.seen: dict[int, int] = {}  # functions that are described already, which may call one another

    def of_function(self, fn: Any) -> list:
        """A function that is no library's."""
        if not isinstance(fn, FunctionType):
            return self.of_unknown(fn, "it")
        if id(fn) in self.seen:
            return ["again", self.seen[id(fn)]]
        self.seen[id(fn)] = len(self.seen)
        code = _code_of(fn)
        try:
            source = textwrap.dedent(inspect.getsource(code))
        except (OSError, TypeError, IndentationError, SyntaxError):
            source = ""
            if not self.key:
                raise NoHash(f"{fn.__name__} has no source: {ADVICE}") from None
        return [
            "function",
            self.key,
            source,
            self.of_value(code, fn.__name__),
            self.of_value(fn.__defaults__, f"a default of {fn.__name__}"),
            self.of_value(fn.__kwdefaults__, f"a default of {fn.__name__}"),
            [[".".join(chain), self.of_name(fn, chain)] for chain in sorted(set(_chains(code)))],
        ]

    def of_name(self, fn: FunctionType, chain: tuple[str, ...]) -> Any:
        """What a name means in a function, attributes of modules followed."""
        root, *attributes = chain
        if root.startswith(IMPORT):
            module = root.removeprefix(IMPORT)
            return (
                ["library", module] if _is_library(module) else self.of_unknown(inspect, f"{module}, imported inside,")
            )
        value = _lookup(fn, root)
        while isinstance(value, ModuleType) and attributes and not _is_library(value.__name__):
            name = attributes.pop(0)
            if not hasattr(value, name):
                raise NoHash(f"{'.'.join(chain)}, which {fn.__name__} refers to, has no value yet")
            value = getattr(value, name)
        if isinstance(value, ModuleType) and _is_library(value.__name__):
            return ["library", ".".join((value.__name__, *attributes))]
        where = f"{'.'.join(chain)}, which {fn.__name__} refers to,"
        if attributes and isinstance(value, FunctionType) and not _is_library(value.__module__):
            return [self.of_value(value, where), self.of_unknown(value, where)]  # what it carries besides its code
        return self.of_value(value, where)

    def of_value(self, value: Any, where: str) -> Any:
        """A constant, a collection of constants, a function or what a library has; `where` it was found, in words."""
        kind, value = type(value), undecorated(value)
        if kind in PLAIN:
            return [kind.__name__, repr(value)]
        if kind in (tuple, list):
            return [kind.__name__, [self.of_value(item, where) for item in value]]
        if kind in (set, frozenset):
            return [kind.__name__, sorted((self.of_value(item, where) for item in value), key=json.dumps)]
        if kind is dict:
            return [kind.__name__, [[self.of_value(part, where) for part in item] for item in value.items()]]
        if kind is CodeType:
            return self.of_code(value, where)
        if isinstance(value, (type, FunctionType, BuiltinFunctionType)) and _is_library(value.__module__):
            return ["library", f"{value.__module__}.{value.__qualname__}"]
        return self.of_function(value) if isinstance(value, FunctionType) else self.of_unknown(value, where)

    def of_code(self, code: CodeType, where: str) -> list:
        """What is run, without where it stands."""
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        constants = [self.of_value(constant, where) for constant in code.co_consts]
        return ["code", code.co_code.hex(), getattr(code, "co_exceptiontable", b"").hex(), shape, names, constants]

    def of_unknown(self, value: Any, where: str) -> list:
        """What the caller's key stands for."""
        if not self.key:
            raise NoHash(f"{where} is of type {type(value).__name__}, which has no hash of its own: {ADVICE}")
        return ["unknown", self.key, type(value).__qualname__]


def _chains(code: CodeType) -> Iterator[tuple[str, ...]]:
    """The names that code and functions inside it take from outside, each with the attributes that follow: math.pi."""
    chain: tuple[str, ...] = ()
    for step in dis.get_instructions(code):
        if chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain += (step.argval,)
        elif step.opname != "EXTENDED_ARG":
            if chain:
                yield chain
            is_outer = step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF")
            chain = (step.argval,) if is_outer and step.argval not in code.co_cellvars else ()
        if step.opname == "IMPORT_NAME":
            yield (f"{IMPORT}{step.argval}",)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from (found for found in _chains(constant) if found[0] not in code.co_cellvars)


def _lookup(fn: FunctionType, name: str) -> Any:
    """The value of a name that a function takes from outside."""
    cells = dict(zip(_code_of(fn).co_freevars, fn.__closure__ or (), strict=True))
    if name in cells:
        try:
            return cells[name].cell_contents
        except ValueError:
            raise NoHash(f"{name}, which {fn.__name__} refers to, has no value yet") from None
    for scope in (fn.__globals__, vars(builtins)):
        if name in scope:
            return scope[name]
    raise NoHash(f"{name}, which {fn.__name__} refers to, has no value yet")


def _code_of(fn: FunctionType) -> CodeType:
    """As it was written: the DSL rewrites a function when it first traces it."""
    return vars(fn).get("_original_code", fn.__code__)


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES
