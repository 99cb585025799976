"""Packed calls without a key: k and v need no address; what is launched has one all the same. No GPU."""

from dataclasses import replace

import pytest
from cuda.bindings.driver import CUdeviceptr
from rule_calls import PACKED, A, Handle

from fa3_cute import Status, forward, warmup


@pytest.mark.parametrize("q", [A, Handle(), CUdeviceptr(A)])
@pytest.mark.parametrize("k, v", [(None, None), (0, CUdeviceptr(0)), (None, 5 * A), (4 * A, 5 * A)])
def test_k_and_v_are_launched_with_an_address(launches, q, k, v):
    """Theirs, or else q's; each time, for the call with an address is another one."""
    params = replace(PACKED, total_k=0, q=q, k=k, v=v)
    launches.stub.call.can_repeat = True
    for _ in range(2):
        assert forward(params, 7) is Status.OK
    assert [call[1][:5] for call in launches.calls] == [(A, k or A, int(v or 0) or A, A, 0)] * 2
    assert warmup(params, 7) is Status.OK


def test_keys_that_come_back_need_theirs(launches):
    assert forward(replace(PACKED, total_k=0, k=None), 7) is Status.OK
    assert forward(replace(PACKED, k=None), 7) is Status.NULL_POINTER
    assert forward(replace(PACKED, total_k=0, q=None), 7) is Status.NULL_POINTER
