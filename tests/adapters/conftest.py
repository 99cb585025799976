"""The engines' modules as far as the adapters use them, made of their recorded signatures; a device of host memory."""

import sys
from pathlib import Path

import pytest
from engine_stubs import stub_modules
from host_memory import HostMemory

ENGINES = Path(__file__).resolve().parents[2] / "examples" / "engines"

try:
    import torch
except ImportError:  # test_signatures.py needs none, and tests/pytorch says what is missing
    collect_ignore_glob = ["test_*_backend.py"]


@pytest.fixture
def engine(monkeypatch):
    """engine(name): the adapter's module, imported with stubs of that engine."""

    def load(name):
        for module, content in stub_modules(name).items():
            monkeypatch.setitem(sys.modules, module, content)
        monkeypatch.syspath_prepend(str(ENGINES))
        monkeypatch.delitem(sys.modules, f"fa3_cute_engines.{name}_backend", raising=False)
        from importlib import import_module

        return import_module(f"fa3_cute_engines.{name}_backend")

    return load


@pytest.fixture
def fake_device(monkeypatch):
    """CPU tensors go where those of a CUDA device do: params of host addresses, which the reference computes."""
    from fa3_cute.torch import device, ops

    memory = HostMemory()
    memory.install(monkeypatch)
    monkeypatch.setattr(device, "_current_device", lambda: None)
    monkeypatch.setattr(device, "_current_stream", lambda index: 0x7770)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ops, "_implementation", lambda x: device)
    device._thread.plans.clear()
    return memory
