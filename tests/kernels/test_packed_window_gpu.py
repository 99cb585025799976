"""Small windows on the GPU through tiles that several heads share (planning/packing.py): every number of heads that is
packed, dense and packed sequences, bands of all kinds, heads that lie apart."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from cases import Case, Layout, with_heads
from check import check, make_problem, packed_problem, params_of, run
from images import heads_before_rows, padded

from fa3_cute.api import kernel_config

pytestmark = pytest.mark.gpu

# (left, right). What each is for:
WINDOWS = (
    (0, 0),  # the diagonal alone
    (1, 0),
    (127, 0),  # what tiles are made for: one of them, but for G = 2 at head_dim 128
    (64, 64),  # both sides
    (300, 17),  # several tiles, interior ones that no mask cuts
    (700, 0),
    (-1, 30),  # one side each
    (30, -1),
)
# (seqlen_q, seqlen_k): as many queries as keys; fewer; more, where the first rows see no key; tiles' corners.
LENGTHS = ((420, 420), (300, 777), (550, 130), (128, 144))
# {packed heads: (query heads, KV heads)}: one group of packed heads per KV head, and several.
HEADS = {8: ((16, 2), (32, 2)), 4: ((8, 2), (12, 1)), 2: ((4, 2), (12, 2))}
FAMILIES = [Case(dtype, head_dim, False, 16, 2, 0, 0, batch=2) for dtype, head_dim in (("bf16", 64), ("fp16", 128))]
KINDS = [
    (with_heads(family, HEADS[packed][number]), packed)
    for (number, family), packed in product(enumerate(FAMILIES), HEADS)
]
IDS = [f"{family.dtype}-d{family.head_dim}-heads{packed}" for family, packed in KINDS]
LAYOUT = Layout((300, 0, 77, 129, 16, 500, 1), (420, 30, 0, 1, 16, 290, 200), before=3, after=5)


def sized(family: Case, lengths: tuple[int, int], window: tuple[int, int], **changes) -> Case:
    return replace(family, seqlen_q=lengths[0], seqlen_k=lengths[1], window=window, **changes)


def run_packed(problem, packed, stream):
    """The result of the kernel that packs so many heads: asked for, since not all of these windows are small."""
    assert kernel_config(params_of(problem, pack_gqa=True)).packed_heads == packed
    return run(problem, stream, pack_gqa=True)


def run_and_check(problem, packed, stream):
    check(problem, *run_packed(problem, packed, stream))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("family, packed", KINDS, ids=IDS)
def test_grid(family, packed, window, lengths, stream):
    run_and_check(make_problem(sized(family, lengths, window)), packed, stream)


@pytest.mark.parametrize("window", [(127, 0), (20, 40)], ids=str)
@pytest.mark.parametrize("heads", [1, 0])
@pytest.mark.parametrize("family, packed", KINDS, ids=IDS)
def test_heads_of_both_ratios_without_lse(family, packed, heads, window, stream):
    family = with_heads(family, HEADS[packed][heads])
    run_and_check(make_problem(sized(family, (333, 400), window, has_lse=False)), packed, stream)


@pytest.mark.parametrize("lengths", [(65, 65), (67, 1), (799, 3), (71, 2000), (144, 143), (129, 1)], ids=str)
@pytest.mark.parametrize("family, packed", KINDS, ids=IDS)
def test_unusual_lengths(family, packed, lengths, stream):
    """Few rows, one key, a band that begins thousands of keys in; rows without a key."""
    run_and_check(make_problem(sized(family, lengths, (127, 0))), packed, stream)


@pytest.mark.parametrize("window", [(127, 0), (0, 0), (500, 30)], ids=str)
@pytest.mark.parametrize("family, packed", KINDS, ids=IDS)
def test_several_tiles_per_cta(family, packed, window, stream):
    """More tiles than CTAs, so that rings and barriers are carried on, tiles without a key among them."""
    case = sized(family, (1300, 1100), window, num_heads=32, num_heads_k=32 // packed, batch=1)
    run_and_check(make_problem(case), packed, stream)


@pytest.mark.parametrize("window", [(40, 419), (0, 0), (63, 0)], ids=str)
@pytest.mark.parametrize("family, packed", KINDS, ids=IDS)
def test_a_band_that_misses_the_keys(family, packed, window, stream):
    """130 keys for 550 queries: the band of the first 420 - right rows ends before key 0."""
    problem = make_problem(sized(family, (550, 130), window))
    out, lse = run_packed(problem, packed, stream)
    num_empty = 420 - window[1]
    assert not out[:, :num_empty].any() and (lse[..., :num_empty] == -np.inf).all()
    assert np.isfinite(lse[..., num_empty:]).all()
    check(problem, out, lse)


@pytest.mark.parametrize("place", [padded, heads_before_rows], ids=lambda place: place.__name__)
@pytest.mark.parametrize("family, packed", KINDS, ids=IDS)
def test_strides(family, packed, place, stream):
    """Heads, which are rows of a tile, lie where their stride says, in O too; what lies between them stays."""
    run_and_check(make_problem(sized(family, (200, 300), (127, 0)), place), packed, stream)


@pytest.mark.parametrize("seqused_k", [None, (400, 0, 0, 1, 5, 260, 200)], ids=["whole", "used"])
@pytest.mark.parametrize("window", [(0, 0), (127, 0), (50, 20), (300, 17), (-1, 100)], ids=str)
@pytest.mark.parametrize("family, packed", KINDS, ids=IDS)
def test_packed_sequences(family, packed, window, seqused_k, stream):
    """The last tile of each ends within the next one's rows; unused rows are NaN; sequences of nothing."""
    used = {"seqused_k": seqused_k} if seqused_k else {}
    run_and_check(packed_problem(family, LAYOUT, used=used, window=window), packed, stream)


@pytest.mark.parametrize("family, packed", KINDS, ids=IDS)
def test_packed_sequences_of_heads_before_rows(family, packed, stream):
    """Their last tiles are stored row by row."""
    run_and_check(packed_problem(family, LAYOUT, heads_before_rows, window=(127, 0)), packed, stream)


@pytest.mark.parametrize("window", [(60, 0), (100, 30)], ids=str)
@pytest.mark.parametrize("family, packed", KINDS, ids=IDS)
def test_dense_with_used_lengths(family, packed, window, stream):
    lengths = {"seqused_q": (300, 111), "seqused_k": (123, 420)}
    run_and_check(make_problem(sized(family, (300, 420), window), lengths=lengths), packed, stream)


@pytest.mark.parametrize(
    "feature",
    [
        {"sinks": (0.5, -2.0, 3.0)},
        {"sinks": (0.5, -2.0, 3.0), "sink_dtype": "bf16", "has_lse": False},
        {"alibi": "heads"},
        {"alibi": "sequences", "sinks": (1.0, -1.0, 2.5)},
        {"softcap": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("family, packed", [*KINDS[:1], *KINDS[4:]], ids=[*IDS[:1], *IDS[4:]])
def test_sinks_slopes_and_softcap(family, packed, feature, stream):
    """A row's sink and slope are its head's; a row without keys has its sink alone."""
    run_and_check(make_problem(sized(family, (550, 430), (127, 0), **feature)), packed, stream)
    run_and_check(packed_problem(family, LAYOUT, window=(60, 5), **feature), packed, stream)


@pytest.mark.parametrize("family, packed", KINDS[::2], ids=IDS[::2])
def test_runs_agree_bit_for_bit(family, packed, stream):
    problem = make_problem(sized(family, (1900, 2100), (127, 0)))
    first = run_packed(problem, packed, stream)
    check(problem, *first)
    for _ in range(20):
        problem.out.poison(stream)
        for a, b in zip(first, run_packed(problem, packed, stream), strict=True):
            assert a.tobytes() == b.tobytes()
