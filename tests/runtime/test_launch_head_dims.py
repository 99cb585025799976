"""What reaches the kernel of head dims that the tables do not have: tensor maps of the tensors' extents; as
test_launch.py."""

from test_launch_packed_heads import K, OUT, Q, sizes, strides

V = hex(0xFFFF80000000)
TELL = """
places = kernel_parameters(cfg)
launch(params(**changes), cfg, STREAM[0])
given = [struct.unpack("<32I", p) for p in recorded(places) if len(p) == 128]
tell(descriptors={hex(words[0] | words[1] << 32): words for words in given}, name=cfg.name,
     table=forward_config("bf16", 96, "causal", True, False).name)
"""
OF_CALL = """
from fa3_cute.contract.plain import plain
from fa3_cute.planning.operations import operation_of
from fa3_cute.planning.problem import ProblemShape
call = params(dtype=DataType.BF16, **changes)
cfg = operation_of(ProblemShape.of(plain(call))).launches[-1].config
"""


def extents(words, number: int = 4) -> tuple[list[int], list[int]]:
    return sizes(words)[:number], strides(words)[: number - 1]


def test_dense_tensors_have_their_own_columns(run):
    """Of contiguous ones, and of rows with gaps behind them, which TMA neither reads nor writes."""
    told = run(
        """changes = dict(head_dim=72, head_dim_v=40, v_row_stride=512, v_head_stride=256, v_batch_stride=1 << 22,
               out_head_stride=64, out_row_stride=640)"""
        + OF_CALL
        + TELL
    )
    q, k, v, out = (told["descriptors"][address] for address in (Q, K, V, OUT))
    assert told["name"] == told["table"]
    assert extents(q) == ([72, 1000, 8, 2], [8 * 72, 72, 1000 * 8 * 72])
    assert extents(k) == ([72, 1100, 2, 2], [2 * 72, 72, 1100 * 2 * 72])
    assert extents(v) == ([40, 1100, 2, 2], [512, 256, 1 << 22])
    assert extents(out) == ([40, 1000, 8, 2], [640, 64, 1000 * 8 * 40])


def test_192_and_128(run):
    told = run("changes = dict(head_dim=192, head_dim_v=128)" + OF_CALL + TELL)
    q, k, v, out = (told["descriptors"][address] for address in (Q, K, V, OUT))
    assert "d192v128" in told["name"]
    assert [sizes(words)[0] for words in (q, k, v, out)] == [192, 192, 128, 128]
    assert extents(v) == ([128, 1100, 2, 2], [2 * 128, 128, 1100 * 2 * 128])


def test_pages(run):
    """Narrow boxes, whose pool has the tensor's columns."""
    told = run(
        """changes = dict(head_dim=112, seqlen_q=200, page_table=0x7F0011223340, page_size=16, num_pages=300,
               seqused_k=0x7F0011223380, seqlen_k=1600)"""
        + OF_CALL
        + TELL
    )
    k, v = (told["descriptors"][address] for address in (K, V))
    assert "padded" in told["name"] and "_p16_" in told["name"]
    assert extents(k) == extents(v) == ([112, 16, 2, 300], [2 * 112, 112, 16 * 2 * 112])
