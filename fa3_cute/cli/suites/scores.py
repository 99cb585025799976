"""What changes scores, hides keys or drops probabilities, beside the same problem without; models' windows; heads that
share tiles, and the same apart."""

from collections.abc import Sequence
from dataclasses import replace

from ...contract.formats import FP8
from ..case import Case
from ..compared import versus_16_bit, versus_peers
from ..dtypes import DEFAULT, head_dims
from ..features import BIAS, Feature
from ..shown import OURS, OURS_16, Shown, marked_microseconds, microseconds, of_first, rate

TITLE = "Scores and masks"
SHOWN = Shown(
    printed=(("us", 8, microseconds), ("TFLOP/s", 8, rate), ("of first", 8, of_first)),
    markdown=(("us", 8, microseconds), ("TFLOP/s", 8, rate), ("of first", 8, of_first)),
    peer=("us", 8, marked_microseconds),
    problem=(
        ("type", "dtype"),
        ("head_dim", "head_dim"),
        ("heads", "heads"),
        ("sequences", "layout"),
        ("mask", "mask"),
        ("scores", "scores"),
    ),
    has_variants=False,
)
FIXED = ("seqlen", "masks", "batch_size", "num_heads", "num_heads_k")
CAUSAL = (-1, 0)
READ_BYTES_PER_MS = 4.3e9  # of device memory, by a kernel that does nothing else
MASK_BYTES = {BIAS: 2, "bool": 1}

WITHOUT = Feature("without")
SINKS = Feature("sinks", s_aux=True)
CAP_30 = Feature("softcap 30", softcap=30.0)
CAP_50 = Feature("softcap 50", softcap=50.0)
APART = "pack_gqa=False"
ALL = (
    WITHOUT,
    SINKS,
    CAP_30,
    replace(CAP_30, name="softcap 30 as a ScoreMod", score_mod=True),
    Feature("ALiBi", alibi_slopes=True),
    Feature("dropout 0.1", p_dropout=0.1),
    Feature("BF16 bias", attn_mask=BIAS),
    Feature("boolean mask", attn_mask="bool"),
    Feature("chunks of 1024", attention_chunk=1024),
)
SMALL_WINDOW = (
    WITHOUT,
    SINKS,
    replace(WITHOUT, name=APART, pack_gqa=False),
    replace(SINKS, name=f"sinks, {APART}", pack_gqa=False),
)
PACKED = replace(WITHOUT, name="pack_gqa=True", pack_gqa=True)

# head_dim, query heads, KV heads, sequences, tokens of each, window, what is asked of scores.
PREFILLS = (
    (128, 16, 16, 4, 4096, CAUSAL, ALL),
    (256, 8, 4, 2, 8192, CAUSAL, (WITHOUT, CAP_50)),
    (64, 64, 8, 2, 8192, (127, 0), SMALL_WINDOW),
    (128, 32, 8, 2, 8192, (127, 0), SMALL_WINDOW),
    (64, 64, 8, 2, 8192, (1023, 0), (WITHOUT, PACKED)),
    (128, 32, 8, 2, 8192, (1023, 0), (WITHOUT, PACKED)),
    (256, 8, 4, 2, 8192, (4095, 0), (WITHOUT,)),
    (128, 32, 8, 1, 16384, (4095, 0), (WITHOUT,)),
)
# Causal problems, and the same as a window that no key is left of: its kernels pack heads.
SHORT = ((128, 32, 8, 32, 512), (128, 32, 8, 16, 1024))
# head_dim, query heads, KV heads, sequences, keys of each.
DECODES = ((128, 16, 2, 4, 2048), (128, 16, 2, 1, 32768))
# head_dim, heads, documents, tokens of each.
DOCUMENTS = (128, 16, 16, 1024)


def cases(args) -> list[Case]:
    """Every case that the command line leaves in, those of a problem one after the other."""
    dtype = args.dtype or DEFAULT
    found = []
    for head_dim, num_heads, num_heads_k, batch_size, seqlen, window, asked in PREFILLS:
        is_causal = window == CAUSAL
        sizes = dtype, head_dim, is_causal, seqlen, seqlen, batch_size, num_heads, num_heads_k
        found += problem(Case(*sizes, window=(-1, -1) if is_causal else window), asked)
    for head_dim, num_heads, num_heads_k, batch_size, seqlen in SHORT:
        causal = Case(dtype, head_dim, True, seqlen, seqlen, batch_size, num_heads, num_heads_k)
        first, packed = problem(causal, (WITHOUT, PACKED))
        found += [first, replace(packed, is_causal=False, window=(seqlen - 1, 0))]
    found += documents(dtype, is_causal=True) + documents(dtype, is_causal=False)
    for head_dim, num_heads, num_heads_k, batch_size, seqlen in DECODES:
        decode = Case(dtype, head_dim, False, 1, seqlen, batch_size, num_heads, num_heads_k)
        found += problem(decode, (WITHOUT, SINKS, CAP_30))
    dims = args.head_dim or head_dims(dtype)
    # FP8 heads share no tiles of the forward kernel.
    return [case for case in found if case.head_dim in dims and (dtype != FP8 or case.scores.pack_gqa is None)]


def problem(case: Case, asked: Sequence[Feature]) -> list[Case]:
    """A problem with each of these."""
    return [replace(case, scores=feature, group=case.name) for feature in asked]


def documents(dtype: str, is_causal: bool) -> list[Case]:
    """Documents as packed sequences, and as one sequence with a MaskMod, with and without block lists."""
    head_dim, heads, number, length = DOCUMENTS
    label = f"{number} documents of {length}"
    packed = Case(
        dtype, head_dim, is_causal, length, length, number, heads, heads, lengths=(length,) * number, label=label
    )
    one = replace(packed, seqlen_q=number * length, seqlen_k=number * length, batch_size=1, lengths=())
    mod = Feature("MaskMod", mask_mod=length)
    lists = replace(mod, name="MaskMod, block lists", block_mask=True)
    first = replace(packed, scores=Feature("packed sequences"), group=packed.name)
    return [first, *(replace(one, scores=feature, group=packed.name) for feature in (lists, mod))]


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows a peer is faster; what features cost us and a peer; a mask of full size beside reading it."""
    lines = versus_peers(rows) + versus_16_bit(rows)
    for row in rows:
        results = row["results"]
        theirs = {name: result["of_first"] for name, result in results.items() if "of_first" in result}
        others = [f"{ratio:.3f}x of {name}" for name, ratio in theirs.items() if name not in (OURS, OURS_16)]
        if others and theirs[OURS] != 1:
            lines.append(f"{row['name']}: {theirs[OURS]:.3f}x the time of the first row, {', '.join(others)}")
    firsts = {}
    for case, time in times.items():
        first = firsts.setdefault(case.group, time)
        if kind := case.scores.attn_mask:
            nbytes = MASK_BYTES[kind] * case.visible_flops / (4 * case.head_dim)
            reading = nbytes / READ_BYTES_PER_MS
            lines.append(
                f"{case.name}: {time / max(first, reading):.3f}x the larger of the time without it and of reading it, "
                f"{nbytes / 1e9:.2f} GB of keys that are seen in {1000 * reading:.0f} us"
            )
    return lines
