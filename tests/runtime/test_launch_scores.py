"""What reaches the kernels of sinks, slopes, masks and random states. On the fake CUDA of conftest.py."""

import pytest

GIVEN = """
from fa3_cute import api, forward
full = []
def counted(*arguments, launch=module.launch):
    full.append(1)
    return launch(*arguments)
module.launch = counted
AT = {"s_aux": 0x7F6600000010, "alibi_slopes": 0x7F6600000020, "attn_mask": 0x7F6600000030, "rng_state": 0x7F6600000040}
"""
KERNELS = {"forward": "call = prefill_params", "decode": "call = decode_params"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_sinks_reach_the_kernel_that_has_none_too(run, kernel):
    """They come and go at run time; addresses of a call like the last are all that is written."""
    found = run(
        KERNELS[kernel]
        + GIVEN
        + """
def sent(**changes):
    forward(call(**changes), STREAM[0]).check()
    return [reached(places, sinks=AT["s_aux"], moved=0x7F7700000010)[name] for name in ("sinks", "moved")] + [len(full)]
places = kernel_parameters(api.kernel_config(call()))
steps = [sent(), sent(s_aux=AT["s_aux"]), sent(s_aux=AT["s_aux"]), sent(s_aux=0x7F7700000010), sent(), sent()]
tell(steps=steps, same=api.kernel_config(call()) is api.kernel_config(call(s_aux=AT["s_aux"])))
"""
    )
    assert found["same"], "a null pointer is no kernel of its own"
    assert found["steps"] == [
        [False, False, 1],
        [True, False, 2],
        [True, False, 2],
        [False, True, 2],
        [False, False, 3],
        [False, False, 3],
    ]


FEATURES = {
    "alibi_slopes": ("alibi_slopes=AT['alibi_slopes'], alibi_batch_stride=12345", {"stride": 12345}),
    "attn_mask": ("attn_mask=AT['attn_mask'], attn_mask_row_stride=23456", {"stride": 23456}),
    "rng_state": ("rng_state=AT['rng_state'], p_dropout=0.25", {}),
}


@pytest.mark.parametrize("name", FEATURES)
def test_what_the_kernel_reads_is_what_the_call_gives(run, name):
    fields, values = FEATURES[name]
    found = run(
        KERNELS["forward"]
        + GIVEN
        + f"""
fields = dict({fields})
params = call(**fields)
places = kernel_parameters(api.kernel_config(params))
forward(params, STREAM[0]).check()
first = reached(places, address=AT[{name!r}], **{values})
forward(call(**fields | {{{name!r}: AT[{name!r}] + 0x1000}}), STREAM[0]).check()
tell(first=first, moved=reached(places, old=AT[{name!r}], new=AT[{name!r}] + 0x1000), full=len(full))
"""
    )
    assert all(found["first"].values()), found["first"]
    assert found["moved"] == {"old": False, "new": True} and found["full"] == 1
