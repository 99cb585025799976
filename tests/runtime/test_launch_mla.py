"""What reaches the MLA kernel, and those of heads of 512 and of q_v. On the fake CUDA of conftest.py."""


def test_grids_and_descriptors(run):
    """Two M tiles of each of two sequences; of K one descriptor, none of V, whose rows are K's."""
    found = run("""
from fa3_cute import forward
from fa3_cute.planning.mla import mla_config
places = kernel_parameters(mla_config("bf16", False))
MLA = dict(head_dim=576, head_dim_v=512, num_heads=128, num_heads_k=1, v=POINTERS["k"], k_row_stride=640,
           k_batch_stride=640 * 8192)
def sent(**changes):
    forward(decode_params(**MLA | changes), STREAM[0]).check()
    return [list(last.grid), list(last.block), list(last.cluster), last.smem]
grids = [sent(num_splits=n) for n in (1, 4, 11, 48)]
floats = [struct.unpack("<f", p)[0] for p in recorded(places) if len(p) == 4]
tell(grids=grids, descriptors=descriptors(places), floats=floats, scratch=len(scratch(places)), k=POINTERS["k"])
""")
    smem = 232448
    assert found["grids"] == [
        [[4, 1, 1], [384, 1, 1], [1, 1, 1], smem],
        [[16, 1, 1], [384, 1, 1], [4, 1, 1], smem],
        [[44, 1, 1], [384, 1, 1], [1, 1, 1], smem],
        [[192, 1, 1], [384, 1, 1], [16, 1, 1], 230400],
    ]
    ((address, sizes),) = found["descriptors"].items()
    assert int(address) == found["k"] and sizes[:2] == [576, 8192] and sorted(sizes[2:]) == [1, 1, 2]
    assert any(abs(value - 1.4426950408889634 / 24) < 1e-6 for value in found["floats"])
    assert found["scratch"] == 3


def test_pages_of_a_pool(run):
    """Their descriptor has the pool's pages; a table and lengths reach the kernel."""
    found = run("""
from fa3_cute import forward
from fa3_cute.planning.mla import mla_config
from fa3_cute.planning.tables import KeySource
places = kernel_parameters(mla_config("bf16", False, None, KeySource(True, 64, True)))
given = dict(page_table=0x7F0011223344, seqused_k=0x7F00DDEEFF10)
call = decode_params(head_dim=576, head_dim_v=512, num_heads=16, num_heads_k=1, v=POINTERS["k"], page_size=64,
                     num_pages=999, **given)
forward(call, STREAM[0]).check()
tell(descriptors=descriptors(places), given=reached(places, **given), k=POINTERS["k"], block=list(last.block))
""")
    assert found["block"] == [384, 1, 1] and all(found["given"].values())
    ((address, sizes),) = found["descriptors"].items()
    assert int(address) == found["k"] and sorted(sizes) == sorted((64, 8, 8, 9, 64 * 999))


def test_heads_of_512(run):
    """K and V have a descriptor each."""
    found = run("""
from fa3_cute import forward
from fa3_cute.planning.mla import mla_config
places = kernel_parameters(mla_config("bf16", False, dims=(512, 512)))
forward(decode_params(head_dim=512, num_heads=32, num_heads_k=4), STREAM[0]).check()
tell(descriptors=descriptors(places), k=POINTERS["k"], v=POINTERS["v"], block=list(last.block), smem=last.smem)
""")
    assert found["block"] == [384, 1, 1] and found["smem"] in (201728, 232448)
    assert {int(address): sizes[0] for address, sizes in found["descriptors"].items()} == {
        found["k"]: 512,
        found["v"]: 512,
    }


def test_the_second_part_of_q(run):
    """Its address and strides reach the kernel; a call that differs in the address alone is a repetition."""
    found = run("""
from fa3_cute import api, forward
from fa3_cute.planning.mla import mla_config
places = kernel_parameters(mla_config("bf16", False, dims=(64, 512)))
checked = []
def counted(*arguments, launch=module.launch):
    checked.append(1)
    return launch(*arguments)
module.launch = counted
SENT = dict(q_v=0x7F0011223340, q_v_batch_stride=71680, q_v_head_stride=560)
CALL = dict(head_dim=64, head_dim_v=512, num_heads=16, num_heads_k=1) | SENT
def sent(address, **changes):
    forward(decode_params(**CALL | changes | dict(q_v=address)), STREAM[0]).check()
    return [reached(places, q_v=address)["q_v"], len(checked)]
steps = [sent(0x7F0011223340), sent(0x7F0055667780), sent(0x7F0011223340, batch_size=3)]
tell(steps=steps, sent=reached(places, **SENT), descriptors=descriptors(places), k=POINTERS["k"], v=POINTERS["v"],
     refused=[int(forward(decode_params(**CALL | dict(q_v=address)), STREAM[0])) for address in (None, 0x7F0011223348)])
""")
    assert found["steps"] == [[True, 1], [True, 1], [True, 2]]
    assert all(found["sent"].values()) and found["refused"] == [-2, -9]
    assert {int(address): sizes[0] for address, sizes in found["descriptors"].items()} == {
        found["k"]: 64,
        found["v"]: 512,
    }


def test_values_that_are_no_longer_the_keys_are_seen(run):
    """In a call that differs from the one before in addresses alone."""
    found = run("""
from fa3_cute import forward
call = dict(head_dim=576, head_dim_v=512, num_heads=16, num_heads_k=1)
told = [int(forward(decode_params(**call | dict(v=POINTERS[name])), STREAM[0])) for name in "kkv"]
tell(told=told)
""")
    assert found["told"] == [0, 0, -16]
