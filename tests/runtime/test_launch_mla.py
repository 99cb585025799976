"""What reaches the MLA kernel. On the fake CUDA of conftest.py."""


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
