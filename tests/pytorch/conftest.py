"""Tensors, and a device that is host memory."""

from types import SimpleNamespace

import numpy as np
import pytest
from host_memory import NAMES, HostMemory, array, options, tensor

from fa3_cute.contract.backward_reference import OPTIONS, Saved, backward_reference
from fa3_cute.contract.number_formats import to_bits
from fa3_cute.contract.params import is_packed
from fa3_cute.contract.rows import used_rows
from fa3_cute.contract.status import Status

try:
    import torch
except ImportError:  # test_installed.py says so
    collect_ignore_glob = ["test_[!i]*.py"]


class Memory(HostMemory):
    """Whose backward differentiates what changes scores."""

    def backward(self, params, stream):
        self._check(params, stream)
        p, names = params, ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
        q, k, v, out, dout, *gradients = (tensor(p, name) for name in names)
        shape = (p.num_heads, p.total_q) if is_packed(p) else (p.batch_size, p.num_heads, p.seqlen_q)
        lse, dlse = (array(address, shape, np.float32) if address else None for address in (p.softmax_lse, p.dlse))
        given = {name: value for name, value in options(p).items() if name in OPTIONS}
        found = backward_reference(q, k, v, dout, Saved(out, lse, dlse), **given)
        for gradient, exact, of in zip(gradients, found, "qkk", strict=True):
            for rows in used_rows(exact, given.get(f"cu_seqlens_{of}"), given.get(f"seqused_{of}")):
                gradient[rows] = to_bits(exact[rows], NAMES[p.dtype])
        if p.d_s_aux:
            array(p.d_s_aux, (p.num_heads,), np.float32)[...] = found.d_s_aux
        return Status.OK


@pytest.fixture
def fake_device(monkeypatch):
    """CPU tensors go where those of a CUDA device do: params of host addresses, which the reference computes.

    is_capturing may be set; allocated lists what is asked of torch.empty and torch.zeros: (elements, dtype).
    """
    from fa3_cute.torch import device, ops

    memory = Memory()
    memory.install(monkeypatch)
    memory.is_capturing = False
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0x7770))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: memory.is_capturing)
    monkeypatch.setattr(ops, "_implementation", lambda x: device)
    device._thread.plans.clear()
    device._thread.backward_plans.clear()
    return memory
