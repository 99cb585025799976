"""What reaches the kernel where heads share tiles: views of Q and O by TMA, and CTAs; as test_launch.py."""

from fa3_cute.planning.tables import PACKED

START = """
from fa3_cute.planning.tables import packed_config
cfg = packed_config(forward_config("bf16", 128, "local", True, IS_VARLEN), 4)
places = kernel_parameters(cfg)
call = dict(is_causal=False, window_size_left=127, window_size_right=0, num_heads=24, num_heads_k=2)
"""
TELL = """
launch(params(**call | changes), cfg, STREAM[0])
given = [struct.unpack("<32I", p) for p in recorded(places) if len(p) == 128]
tell(descriptors={hex(words[0] | words[1] << 32): words for words in given}, grid=list(last.grid))
"""
Q, K, OUT = hex(0x7F1234567000), hex(0x7E0000000000), hex(0x100000010)
BYTES = 16  # of a unit of strides
QUERIES = PACKED[128, 4].tile_m // 4


def sizes(words) -> list[int]:
    return [word + 1 for word in words[8:13]]


def strides(words) -> list[int]:
    """In elements, but the first dimension's, which is 1."""
    return [word * BYTES // 2 for word in words[3:7]]


def test_dense_queries(run):
    """Columns, heads of a group, queries, groups of heads, batch: strides as given."""
    told = run(
        START.replace("IS_VARLEN", "False")
        + "changes = dict(q_batch_stride=2**33 + 1024, q_row_stride=4096, q_head_stride=256)"
        + TELL
    )
    q, out, k = (told["descriptors"][address] for address in (Q, OUT, K))
    assert sizes(q) == sizes(out) == [128, 4, 1000, 6, 2]
    assert strides(q) == [256, 4096, 4 * 256, 2**33 + 1024]
    assert strides(out) == [128, 24 * 128, 4 * 128, 1000 * 24 * 128]
    assert sizes(k)[:4] == [128, 1100, 2, 2]
    assert told["grid"] == [min(132, -(-1000 // QUERIES) * 6 * 2), 1, 1]


def test_few_tiles_are_few_ctas(run):
    """One per tile of so many queries and heads."""
    told = run(START.replace("IS_VARLEN", "False") + "changes = dict(seqlen_q=70, batch_size=3)" + TELL)
    assert told["grid"] == [-(-70 // QUERIES) * 6 * 3, 1, 1]
    assert sizes(told["descriptors"][Q]) == [128, 4, 70, 6, 3]


def test_packed_sequences(run):
    """As many CTAs as tiles that any lengths can make."""
    told = run(
        START.replace("IS_VARLEN", "True") + "changes = PACKED | dict(total_q=200, batch_size=5, seqlen_q=None)" + TELL
    )
    assert sizes(told["descriptors"][Q])[:4] == sizes(told["descriptors"][OUT])[:4] == [128, 4, 200, 6]
    assert told["grid"] == [(200 // QUERIES + 5) * 6, 1, 1]
