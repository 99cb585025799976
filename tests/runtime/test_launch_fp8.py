"""What reaches the FP8 kernels: their tensors, their descales. On the fake CUDA of conftest.py."""

import pytest

# `given` is what arrived of the descales, and how many calls so far were looked at in full.
GIVEN = """
from fa3_cute import api, forward
places = kernel_parameters(cfg)
checked = []
def counted(*arguments, launch=module.launch):
    checked.append(1)
    return launch(*arguments)
module.launch = counted
def given(stream=STREAM[0], **changes):
    forward(call(**FP8 | DESCALES | changes), stream).check()
    return reached(places, **DESCALES, **DESCALE_STRIDES) | {"checked": len(checked)}
"""
KERNELS = {"forward": "cfg, call = FP8_CFG, prefill_params", "decode": "cfg, call = FP8_DECODE_CFG, decode_params"}
POINTERS = ("q_descale_ptr", "k_descale_ptr", "v_descale_ptr")
STRIDES = tuple(f"{tensor}_descale_{dim}_stride" for tensor in "qkv" for dim in ("batch", "head"))


@pytest.fixture(params=KERNELS)
def told(run, request):
    """told(script): `run` it behind GIVEN, for either kernel."""
    return lambda script: run(KERNELS[request.param] + GIVEN + script)


def there(*names, checked=1):
    """What `given` returns if these of the descales' values arrived and no others."""
    return {name: name in names for name in POINTERS + STRIDES} | {"checked": checked}


def test_descales_reach_the_kernel(told):
    """Each by itself and all; where a dimension has size 1, its stride does not."""
    found = told("""
everything = given(**DESCALE_STRIDES)
nothing = given(**dict.fromkeys(DESCALES, None))
alone = [given(**dict.fromkeys(DESCALES, 0) | {name: DESCALES[name]}) for name in DESCALES]
one = given(**DESCALE_STRIDES, batch_size=1)
one_head = given(**DESCALE_STRIDES, num_heads_k=1)
class Pointer:
    def __init__(self, at): self.at = at
    def __int__(self): return self.at
objects = given(**{name: Pointer(at) for name, at in DESCALES.items()})
tell(everything=everything, nothing=nothing, alone=alone, one=one, one_head=one_head, objects=objects)
""")
    assert found["everything"] == there(*POINTERS, *STRIDES)
    assert found["nothing"] == there(checked=2)
    assert found["alone"] == [there(name, checked=2) for name in POINTERS]
    assert found["one"] == there(*POINTERS, *(name for name in STRIDES if "head" in name), checked=3)
    assert found["one_head"] == there(
        *POINTERS, *(name for name in STRIDES if name[0] == "q" or "batch" in name), checked=4
    )
    assert found["objects"] == there(*POINTERS, checked=5)


def test_layers_with_descales_of_their_own_are_repeated(told):
    """And nothing of the call before stays behind, also if that one went around `forward`."""
    found = told("""
others = {name: at + 0x100 for name, at in DESCALES.items()}
def other(): return list(reached(places, **others).values())
first = given()
steps = [[given(**others), other()], [given(), other()], [given(k_descale_ptr=None), other()], [given(), other()]]
launch(call(**FP8 | others), cfg, STREAM[0])
behind = other()
steps.append([given(), other()])
steps.append([given(q=0x7F5500000000, **DESCALE_STRIDES), other()])
tell(first=first, steps=steps, behind=behind)
""")
    ours, none, theirs = there(*POINTERS), [False] * 3, [True] * 3
    assert found["first"] == ours and found["behind"] == theirs
    assert found["steps"] == [
        [there(), theirs],
        [ours, none],
        [there("q_descale_ptr", "v_descale_ptr"), none],
        [ours, none],
        [ours | {"checked": 2}, none],
        [there(*POINTERS, *STRIDES, checked=3), none],
    ]


def test_tensors_of_one_byte_elements(run):
    """TMA counts strides in 16 bytes: that many elements of q, k and v, and 8 of out."""
    found = run("""
places = kernel_parameters(FP8_CFG)
from fa3_cute import forward
forward(prefill_params(**FP8, q_row_stride=4096, k_head_stride=160, v_batch_stride=2**33 + 1024, out_row_stride=4096,
                       out_batch_stride=2**34), STREAM[0]).check()
words = [struct.unpack("<32I", p) for p in recorded(places) if len(p) == 128]
tell(units={w[0] | w[1] << 32: sorted({*w[3:7]} - {0}) for w in words},
     sizes={at: sorted(sizes) for at, sizes in descriptors(places).items()}, pointers=POINTERS, threads=last.block[0],
     smem=last.smem, expected=[FP8_CFG.num_threads, FP8_CFG.smem_bytes])
""")
    units, sizes = (
        {name: found[what][str(found["pointers"][name])] for name in ("q", "k", "v", "out")}
        for what in ("units", "sizes")
    )
    assert set(units["q"]) == {128 // 16, 4096 // 16, 1000 * 8 * 128 // 16}
    assert set(units["k"]) == {160 // 16, 2 * 128 // 16, 1100 * 2 * 128 // 16}
    assert set(units["v"]) == {128 // 16, 2 * 128 // 16, (2**33 + 1024) // 16}
    assert set(units["out"]) == {128 // 8, 4096 // 8, 2**34 // 8}
    assert sizes["q"] == sizes["out"] == sorted((1000, 128, 8, 2, 1))
    assert sizes["k"] == sizes["v"] == sorted((1100, 128, 2, 2, 1))
    assert [found["threads"], found["smem"]] == found["expected"]


def test_the_type_of_out_chooses_the_kernel(run):
    found = run("""
from fa3_cute import forward
def launched(call, **changes):
    forward(call(**changes), STREAM[0]).check()
    return last.kernel
tell(kernels=[[launched(call, **FP8, out_dtype=out_dtype) for out_dtype in (None, DataType.BF16, DataType.FP16)]
              + [launched(call)] for call in (prefill_params, decode_params)])
""")
    for by_default, bf16, fp16, not_fp8 in found["kernels"]:
        assert by_default == bf16 and len({bf16, fp16, not_fp8}) == 3
