"""The forward problems that the GPU tests run, as data. Pure Python."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, product

DTYPES = ("fp16", "bf16")
HEAD_DIMS = (64, 96, 128, 192, 256)
FP8 = "fp8_e4m3"
FP8_HEAD_DIMS = (64, 96, 128, 192, 256)
FP8_OUT_DTYPES = ("bf16", "fp16")

# Query heads, KV heads. Two KV heads where they fit, so that a wrong KV head shows; MQA has an odd group.
HEADS = {"mha": (2, 2), "gqa3": (6, 2), "gqa8": (16, 2), "mqa": (5, 1)}

# (seqlen_q, seqlen_k). What each is for:
LENGTHS = (
    (1, 1),  # the smallest problem
    (1, 333),  # one query row (decoding) over partial key tiles
    (64, 128),  # whole tiles only
    (113, 203),  # neither length a multiple of anything
    (113, 128),  # partial query tile, whole key tile
    (128, 217),  # the reverse
    (239, 1),  # one key; causal: 238 rows without any
    (799, 3),  # causal: whole query tiles without a key
    (108, 256),  # diagonal far from the tile corner
    (256, 512),  # whole tiles, twice as many keys
    (512, 256),  # causal: half of the rows without a key
    (640, 128),  # causal: most query tiles without a key
    (384, 385),  # one key into the next tile
)
# The same with more tiles than a pipeline has stages, one row off in each direction.
LONG_LENGTHS = ((1023, 1024), (1024, 1023), (1024, 1024))
# Enough key tiles for every steady state, as far as the reference's cost permits: lengths, num_heads, num_heads_k.
LONGEST = ((2048, 2048, 2, 1), (4096, 4096, 1, 1), (333, 8191, 3, 1))


@dataclass(frozen=True)
class Case:
    """One forward problem. `str(case)` is its test id and seeds its random inputs.

    Packed sequences: seqlen_q and seqlen_k are the rows of the tensors, batch is the number of sequences.
    out_dtype is for FP8 only.

    kv_dtype     of k and v, "": dtype
    head_dim_v   columns of v and out, 0: head_dim
    softcap, attention_chunk, p_dropout   as the call has them, 0: off
    sinks        logits of attention sinks, taken in turn by the heads; (): none. sink_dtype: "fp32", "bf16", "fp16"
    alibi        "heads" or "sequences": slopes of each head, of each head and sequence; "": none
    attn_mask    "bool", "fp16", "bf16" or "fp32"; "": none. mask_dims: of "bhqk" those along which it differs; it is
                 broadcast along the others. mask_gap: elements between its rows
    """

    dtype: str
    head_dim: int
    is_causal: bool
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    batch: int = 1
    has_lse: bool = True
    window: tuple[int, int] = (-1, -1)
    out_dtype: str | None = None
    softcap: float = 0.0
    sinks: tuple[float, ...] = ()
    sink_dtype: str = "fp32"
    alibi: str = ""
    attn_mask: str = ""
    mask_dims: str = "bhqk"
    mask_gap: int = 0
    attention_chunk: int = 0
    p_dropout: float = 0.0
    head_dim_v: int = 0
    kv_dtype: str = ""

    @property
    def stored(self) -> str:
        """The dtype that k and v really have."""
        return self.kv_dtype or self.dtype

    @property
    def dim_v(self) -> int:
        """Columns of v and out."""
        return self.head_dim_v or self.head_dim

    @property
    def is_mla(self) -> bool:
        """V is the first columns of K."""
        return (self.head_dim, self.head_dim_v) == (576, 512)

    @property
    def has_qv(self) -> bool:
        """There is a second part of q, which meets v."""
        return (self.head_dim, self.head_dim_v) == (64, 512)

    @property
    def element_out(self) -> str:
        """The dtype that O really has."""
        return self.out_dtype or self.dtype

    @property
    def mask(self) -> str:
        if self.window != (-1, -1):
            return "window({},{})".format(*self.window)
        return "causal" if self.is_causal else "full"

    @property
    def has_score_options(self) -> bool:
        """Scores are more than scaled products, or keys hidden by more than a causal mask or a window."""
        is_set = self.softcap, self.sinks, self.alibi, self.attn_mask, self.attention_chunk, self.p_dropout
        return any(is_set)

    @property
    def score_options(self) -> str:
        """What a case's name says of them."""
        sinks = ",".join(f"{sink:g}" for sink in self.sinks)
        parts = (
            (self.softcap, f"softcap{self.softcap:g}"),
            (self.sinks, f"sinks({sinks}){self.sink_dtype if self.sink_dtype != 'fp32' else ''}"),
            (self.alibi, f"alibi({self.alibi})"),
            (self.attn_mask, f"mask({self.attn_mask},{self.mask_dims}{f'+{self.mask_gap}' if self.mask_gap else ''})"),
            (self.attention_chunk, f"chunk{self.attention_chunk}"),
            (self.p_dropout, f"dropout{self.p_dropout:g}"),
        )
        return "".join(f"-{part}" for is_set, part in parts if is_set)

    def __str__(self) -> str:
        return (
            f"{self.dtype}{f'-{self.out_dtype}' if self.out_dtype else ''}"
            f"{f'-{self.kv_dtype}cache' if self.kv_dtype else ''}"
            f"-d{self.head_dim}{f'v{self.head_dim_v}' if self.head_dim_v else ''}-{self.mask}"
            f"-{self.num_heads}over{self.num_heads_k}heads-{self.seqlen_q}x{self.seqlen_k}"
            f"{f'-batch{self.batch}' if self.batch > 1 else ''}{'-lse' if self.has_lse else ''}"
            f"{self.score_options}"
        )


@dataclass(frozen=True)
class Layout:
    """Lengths of packed sequences, and how many rows of q, k, v and out belong to none, before the first and after
    the last."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    before: int = 0
    after: int = 0

    @property
    def total_q(self) -> int:
        return self.before + sum(self.q) + self.after

    @property
    def total_k(self) -> int:
        return self.before + sum(self.k) + self.after

    @property
    def cu_seqlens(self) -> dict[str, list[int]]:
        return {
            f"cu_seqlens_{side}": list(accumulate(lengths, initial=self.before))
            for side, lengths in (("q", self.q), ("k", self.k))
        }


def with_heads(case: Case, heads: tuple[int, int]) -> Case:
    """The same case with other (query heads, KV heads)."""
    return replace(case, num_heads=heads[0], num_heads_k=heads[1])


def in_turn(families: list[Case], values: Iterable, turn: int = 0) -> list[tuple]:
    """(family, value): for each value half of the families, with every dtype, head_dim and mask among them; the other
    half for the next value, and if `turn` is odd."""
    return [
        (family, value)
        for family, (i, value) in product(families, enumerate(values, turn))
        if (_parity(family.dtype, family.head_dim, family.is_causal) + i) % 2 == 0
    ]


def _parity(dtype: str, head_dim: int, is_causal: bool) -> int:
    """Changes with each of them."""
    return DTYPES.index(dtype) + HEAD_DIMS.index(head_dim) + is_causal


def _grid() -> list[Case]:
    """Every dtype, head_dim and mask with every head ratio and every other length; LSE in every second case of each."""
    cases = []
    for dtype, head_dim, is_causal in product(DTYPES, HEAD_DIMS, (False, True)):
        for (i, (heads, heads_k)), (j, (seqlen_q, seqlen_k)) in product(
            enumerate(HEADS.values()), enumerate(LENGTHS + LONG_LENGTHS)
        ):
            if (_parity(dtype, head_dim, is_causal) + j) % 2:
                continue
            is_long = (seqlen_q, seqlen_k) in LONG_LENGTHS
            cases.append(
                Case(
                    dtype,
                    head_dim,
                    is_causal,
                    heads,
                    heads_k,
                    seqlen_q,
                    seqlen_k,
                    batch=1 if is_long else 2,
                    has_lse=(i + j) % 2 == 0,
                )
            )
        seqlen_q, seqlen_k, heads, heads_k = LONGEST[_parity(dtype, head_dim, is_causal) % 3]
        cases.append(Case(dtype, head_dim, is_causal, heads, heads_k, seqlen_q, seqlen_k, has_lse=True))
    return cases


GRID = _grid()

# One case per compiled config family: where a property does not depend on lengths or ratios, these stand for all.
FAMILIES = [
    Case(dtype, head_dim, is_causal, 6, 2, 300, 420, batch=2)
    for dtype, head_dim, is_causal in product(DTYPES, HEAD_DIMS, (False, True))
]

# More tiles than 3 * 132 SMs, so that every CTA of a persistent kernel computes several, of unlike lengths.
MANY_TILES = [
    Case(dtype, head_dim, is_causal, 16, 4, *((1300, 700), (900, 1100))[(i + is_causal) % 2], batch=4)
    for (i, (dtype, head_dim)), is_causal in product(
        enumerate((("fp16", 64), ("bf16", 128), ("fp16", 192), ("bf16", 256))), (False, True)
    )
]

# One case per dtype and head_dim of the decode kernel, over a partly filled last K/V tile.
DECODE = [Case(dtype, head_dim, False, 6, 2, 1, 385, batch=2) for dtype, head_dim in product(DTYPES, HEAD_DIMS)]

# num_splits: automatic; not split; one cluster of CTAs; 8 clusters of 16, mostly more than there are K/V tiles.
SPLITS = (0, 1, 2, 3, 7, 128)
# The other kinds: one cluster of every size, several of every size, more than a merge reads at once (16), the most.
MORE_SPLITS = (4, 5, 6, 8, 10, 11, 15, 16, 17, 24, 27, 34, 64, 251, 255, 256)


# ---- FP8 -----------------------------------------------------------------------------------------------------------


def _fp8_grid() -> list[Case]:
    """Every head_dim, mask and length. Each head_dim and mask meets every combination of head ratio, out_dtype and LSE
    in some length, each length some of them: to cross all four would make 16 times as many cases."""
    choices = list(product(HEADS.values(), FP8_OUT_DTYPES, (False, True)))
    cases = []
    for i, (head_dim, is_causal) in enumerate(product(FP8_HEAD_DIMS, (False, True))):
        for j, (seqlen_q, seqlen_k) in enumerate(LENGTHS + LONG_LENGTHS):
            (heads, heads_k), out_dtype, has_lse = choices[(j + 5 * i) % len(choices)]
            cases.append(
                Case(
                    FP8,
                    head_dim,
                    is_causal,
                    heads,
                    heads_k,
                    seqlen_q,
                    seqlen_k,
                    out_dtype=out_dtype,
                    batch=1 if (seqlen_q, seqlen_k) in LONG_LENGTHS else 2,
                    has_lse=has_lse,
                )
            )
        cases += [
            Case(FP8, head_dim, is_causal, heads, heads_k, seqlen_q, seqlen_k, out_dtype=FP8_OUT_DTYPES[i % 2])
            for k, (seqlen_q, seqlen_k, heads, heads_k) in enumerate(LONGEST)
            if (i + k) % 2
        ]
    return cases


FP8_GRID = _fp8_grid()

# As FAMILIES.
FP8_FAMILIES = [
    Case(FP8, head_dim, is_causal, 6, 2, 300, 420, batch=2, out_dtype=out_dtype)
    for head_dim, is_causal, out_dtype in product(FP8_HEAD_DIMS, (False, True), FP8_OUT_DTYPES)
]
# One per head_dim and mask, with each out_dtype in turn: where O's element type does not matter.
FP8_SOME = [FP8_FAMILIES[index] for index in (0, 3, 5, 6, 8, 11, 13, 14, 16, 19)]
# One per head_dim, of both masks and out_dtypes: where the mask does not matter either.
FP8_FEW = [FP8_FAMILIES[index] for index in (0, 6, 11, 13, 18)]

FP8_MANY_TILES = [
    Case(FP8, head_dim, is_causal, 16, 4, seqlen_q, seqlen_k, batch=5, out_dtype=out_dtype)
    for (head_dim, is_causal), (out_dtype, (seqlen_q, seqlen_k)) in zip(
        product(FP8_HEAD_DIMS, (False, True)), 5 * (("bf16", (1300, 700)), ("fp16", (900, 1100))), strict=True
    )
]

# As DECODE; then one per head_dim.
FP8_DECODE = [
    Case(FP8, head_dim, False, 6, 2, 1, 385, batch=2, out_dtype=out_dtype)
    for head_dim, out_dtype in product(FP8_HEAD_DIMS, FP8_OUT_DTYPES)
]
FP8_DECODE_SOME = FP8_DECODE[1::3] + FP8_DECODE[2:3] + FP8_DECODE[8:9]
FP8_SPLITS = (0, 1, 2, 3, 7)

# 16-bit queries over FP8 keys: one per dtype and head_dim.
FP8_CACHE = [
    Case(dtype, head_dim, False, 6, 2, 1, 385, batch=2, kv_dtype=FP8) for dtype, head_dim in product(DTYPES, (64, 128))
]
