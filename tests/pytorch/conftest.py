"""Tensors, and a device that is host memory."""

import pytest
from host_memory import HostMemory

try:
    import torch
except ImportError:  # test_installed.py says so
    collect_ignore_glob = ["test_[!i]*.py"]


@pytest.fixture
def fake_device(monkeypatch):
    """CPU tensors go where those of a CUDA device do: params of host addresses, which the reference computes.

    is_capturing may be set; allocated lists what is asked of torch.empty and torch.zeros: (elements, dtype).
    """
    from fa3_cute.torch import device, ops

    memory = HostMemory()
    memory.install(monkeypatch)
    memory.is_capturing = False
    monkeypatch.setattr(device, "_current_device", lambda: None)
    monkeypatch.setattr(device, "_current_stream", lambda index: 0x7770)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: memory.is_capturing)
    monkeypatch.setattr(ops, "_implementation", lambda x: device)
    device._thread.plans.clear()
    device._thread.backward_plans.clear()
    return memory
