"""The entry of a kernel, written from its table of arguments: a flat signature, since the DSL exports no other."""
import linecache
from dataclasses import make_dataclass

import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Int64

TYPES = {"pointer": cute.Pointer, "int64": Int64, "int32": Int32, "float32": Float32, "stream": CUstream}
SOURCE = '''@cute.jit
def __call__(self, {parameters}):
    """{doc}"""
    self.launch(Arguments({names}))
'''


def flat_entry(arguments: tuple[tuple[str, str], ...]):
    """A class decorator: `__call__` takes the arguments, (name, kind) in order, and hands them to `launch` as one
    bundle with an attribute each."""
    names = [name for name, _ in arguments]
    bundle = make_dataclass("Arguments", [(name, TYPES[kind]) for name, kind in arguments], frozen=True)

    def decorate(cls):
        doc, _, _ = (cls.launch.__doc__ or "").partition("\n")      # python -OO drops docstrings
        source = SOURCE.format(parameters=", ".join(f"{name}: {kind}_t" for name, kind in arguments),
                               names=", ".join(names), doc=doc)
        file = f"<entry of {cls.__name__}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file    # the DSL reads the source
        scope = {"cute": cute, "Arguments": bundle, "__name__": cls.__module__,
                 **{f"{kind}_t": made for kind, made in TYPES.items()}}
        exec(compile(source, file, "exec"), scope)
        cls.__call__ = scope["__call__"]
        cls.__call__.__qualname__ = f"{cls.__qualname__}.__call__"
        return cls

    return decorate
