"""Arrays, and a device that is host memory."""

import os

import pytest
from host_memory import HostMemory

# Of tests side by side on one GPU each takes what it needs. Read when JAX is first imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

try:
    import jax
except ImportError:  # test_installed.py says so
    collect_ignore_glob = ["test_[!i]*.py"]

STREAM = 0x7770


@pytest.fixture
def fake_device(monkeypatch):
    """XLA's CPU is taken for the device: it calls the handler as its CUDA does, on buffers that are host memory, whose
    addresses the reference computes."""
    from fa3_cute.jax import ffi, traced

    memory = HostMemory()
    memory.install(monkeypatch)
    ffi.register(traced.TARGET, traced._handler, "cpu")
    monkeypatch.setattr(ffi, "stream_of", lambda frame: STREAM)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_device)
    return memory


def on_device(*arrays, cuda, cpu):
    """jax.lax.platform_dependent, which hands over trees that it has taken apart: the order of a dict is another."""
    return cuda(*jax.tree.unflatten(jax.tree.structure(arrays), jax.tree.leaves(arrays)))
