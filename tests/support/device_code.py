"""Methods of device code as the Python that they are written in, for tests that run it on Python's integers."""

from types import FunctionType


def as_python(method):
    """The function below `cute.jit`. Tracing a kernel rewrites its code in place and keeps the original."""
    written = method.__wrapped__
    code = getattr(written, "_original_code", written.__code__)
    return FunctionType(code, written.__globals__, written.__name__, written.__defaults__, written.__closure__)
