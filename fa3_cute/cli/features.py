"""What a case of the benchmark asks of scores: the fields of its call, the arrays that they read, and what comes out.

Arrays are seeded, the same in every run; a mask of full size repeats numbers as Q, K and V do (case.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import BlockMask, DataType, MaskMod, ScoreMod, block_lists, block_sizes
from ..contract.block_mask import LISTS
from ..contract.dropout import effective_p
from ..contract.philox import keep_mask
from ..contract.reference import attention_reference, to_bits
from . import appended

if TYPE_CHECKING:
    from .case import Case

DISTINCT_SCORES = 5_000_011  # random numbers of a mask, an odd period
RNG_STATE = 20_230_711, 0  # seed, offset
BIAS = "bf16"


@dataclass(frozen=True)
class Feature:
    """The fields of a call besides Q, K, V, sizes and masks; `name` is what tables call them. Off by default.

    s_aux, alibi_slopes   whether there are sinks, slopes
    attn_mask   BIAS, of full size, or "bool", of full size, which hides half of the keys
    score_mod   whether it is a ScoreMod that does what softcap says, and not the built-in one
    mask_mod    tokens of a document, outside of which nothing is seen
    block_mask  whether the mask_mod has block lists
    append      rows that the call appends to each sequence
    rotary      whether it rotates them, and Q
    """

    name: str = ""
    softcap: float = 0.0
    s_aux: bool = False
    alibi_slopes: bool = False
    attn_mask: str = ""
    attention_chunk: int = 0
    p_dropout: float = 0.0
    score_mod: bool = False
    mask_mod: int = 0
    block_mask: bool = False
    append: int = 0
    rotary: bool = False
    pack_gqa: bool | None = None

    @property
    def asked(self) -> set[str]:
        """The fields that are not off."""
        return {field.name for field in fields(self) if getattr(self, field.name) != field.default} - {"name"}

    @property
    def segment(self) -> int:
        """Tokens of what a query sees nothing outside of; 0: there is no such thing."""
        return self.attention_chunk or self.mask_mod


# ---- functions -------------------------------------------------------------------------------------------------------


def capped(score, batch, head, query, key, info, aux):
    """scalars[0] * tanh(score * scalars[1]), on the device."""
    from cutlass import cute

    return aux.scalars[0] * cute.math.tanh(score * aux.scalars[1], approx=True)


def capped_on_host(score, batch, head, query, key, info, aux):
    """The same in NumPy."""
    return aux.scalars[0] * np.tanh(score * aux.scalars[1])


def same_document(batch, head, query, key, info, aux):
    """Numbers of documents by token."""
    return aux.load(0, query + info.n_k - info.n_q) == aux.load(0, key)


@cache
def score_mod() -> ScoreMod:
    """Of softcap; scalars: the cap and one over it."""
    return ScoreMod(capped, scalars=2, numpy=capped_on_host)


@cache
def mask_mod() -> MaskMod:
    """Of documents."""
    return MaskMod(same_document, pointers=[("int32", ("seqlen_k",))])


def scalars_of(softcap: float) -> tuple[float, float]:
    """What its ScoreMod takes."""
    return softcap, 1 / softcap


# ---- arrays ----------------------------------------------------------------------------------------------------------


class Array(NamedTuple):
    """An array on the device: how it is made; of how many numbers, if it repeats what is made."""

    make: Callable[[], np.ndarray]
    size: int = 0


def arrays_of(case: "Case") -> dict[str, Array]:
    """What a case's features read, by field; "documents" and the lists of a BlockMask by their own names."""
    asked, heads = case.scores, case.num_heads
    found: dict[str, Array] = {}
    if asked.s_aux:
        found["s_aux"] = Array(lambda: sinks(heads))
    if asked.alibi_slopes:
        found["alibi_slopes"] = Array(lambda: slopes(heads))
    if asked.attn_mask:
        size = prod((case.batch_size, heads, case.seqlen_q, case.seqlen_k))
        found["attn_mask"] = Array(lambda: mask_numbers(asked.attn_mask)[:size], size)
    if asked.p_dropout:
        found["rng_state"] = Array(lambda: np.array(RNG_STATE, np.uint64))
    if asked.mask_mod:
        found["documents"] = Array(lambda: documents(case.seqlen_k, asked.mask_mod))
    if asked.block_mask:
        found |= {name: Array(lambda name=name: getattr(lists_of(case), name)) for name in LISTS}
    if asked.append:
        shapes = appended.shapes_of(case)
        found |= {name: Array(lambda name=name: appended.numbers(case.dtype, name, shapes[name])) for name in shapes}
    return found


@cache
def sinks(heads: int) -> np.ndarray:
    """A logit of each head, BF16 bits."""
    return to_bits(np.random.default_rng(heads).standard_normal(heads, np.float32), "bf16")


@cache
def slopes(heads: int) -> np.ndarray:
    """ALiBi's of so many heads."""
    return np.exp2(-8 * np.arange(1, heads + 1, dtype=np.float32) / heads)


@cache
def mask_numbers(kind: str) -> np.ndarray:
    """What an attn_mask repeats: normal numbers, or bytes of which half are 0."""
    numbers = np.random.default_rng(0).standard_normal(DISTINCT_SCORES, np.float32)
    return to_bits(numbers, kind) if kind == BIAS else (numbers > 0).astype(np.uint8)


@cache
def documents(seqlen: int, document: int) -> np.ndarray:
    """The number of each token's document."""
    return np.arange(seqlen, dtype=np.int32) // document


@cache
def lists_of(case: "Case"):
    """The block lists of a case's documents: the same for all sequences and heads."""
    return block_lists(
        mask_mod(),
        (1, 1, case.seqlen_q, case.seqlen_k),
        block_sizes(case.dtype, case.head_dim),
        causal=case.is_causal,
        window_size=case.window,
        arrays=(documents(case.seqlen_k, case.scores.mask_mod),),
    )


# ---- calls -----------------------------------------------------------------------------------------------------------


def fields_of(case: "Case", pointers: dict[str, int]) -> dict[str, Any]:
    """The fields of a case's call that are not the addresses of arrays, and those that are made of them: these leave
    `pointers`."""
    asked = case.scores
    found: dict[str, Any] = {"attention_chunk": asked.attention_chunk, "p_dropout": asked.p_dropout}
    found |= {"pack_gqa": asked.pack_gqa} | appended.fields_of(case)
    if asked.s_aux:
        found["s_aux_dtype"] = DataType.BF16
    if asked.attn_mask == BIAS:
        found["attn_mask_dtype"] = DataType.BF16
    if asked.score_mod:
        found |= {"score_mod": score_mod(), "mod_scalars": scalars_of(asked.softcap)}
    else:
        found["softcap"] = asked.softcap
    if asked.mask_mod:
        found |= {"mask_mod": mask_mod(), "mod_pointers": (pointers.pop("documents"),)}
    if asked.block_mask:
        q_block, kv_block = block_sizes(case.dtype, case.head_dim)
        addresses = {name: pointers.pop(name) for name in LISTS}
        found["block_mask"] = BlockMask(**addresses, q_block=q_block, kv_block=kv_block)
    return found


def expected(case: "Case", sequence: int, head: int, q, k, v) -> np.ndarray:
    """O [1, rows, 1, head_dim], float64, of the last rows of one head of a sequence, whose Q these are, and K and V all
    that the sequence has: the reference's."""
    if case.scores.append:
        q, k, v = appended.updated(case, sequence, head, q, k, v)
    options = {"window_size": case.visible_bounds} | options_of(case, sequence, head, q.shape[1])
    exact, lse = attention_reference(q, k, v, **options)
    p = case.scores.p_dropout
    if not p:
        return exact
    # Dropout goes by places in the whole sequence. Of the keys that it keeps, P are those among all, up to their sum.
    first = (case.lengths[sequence] if case.lengths else case.seqlen_q) - q.shape[1]
    kept = keep_mask(p, *RNG_STATE, sequence, head, range(first, first + q.shape[1]), range(k.shape[1]))
    options["mask_mod"] = lambda batch, head, query, key, info: kept[query, key]
    of_kept, lse_of_kept = attention_reference(q, k, v, **options)
    return of_kept * np.exp(lse_of_kept - lse).transpose(0, 2, 1)[..., None] / (1 - effective_p(p))


def options_of(case: "Case", sequence: int, head: int, rows: int) -> dict[str, Any]:
    """The reference's options of so many last rows of one head of a sequence; without dropout."""
    asked, heads = case.scores, slice(head, head + 1)
    found: dict[str, Any] = {"attention_chunk": asked.attention_chunk}
    if asked.s_aux:
        found["s_aux"] = sinks(case.num_heads)[heads]
    if asked.alibi_slopes:
        found["alibi_slopes"] = slopes(case.num_heads)[heads]
    if asked.attn_mask:
        stop = ((sequence * case.num_heads + head + 1) * case.seqlen_q) * case.seqlen_k
        places = np.arange(stop - rows * case.seqlen_k, stop)
        numbers = np.take(mask_numbers(asked.attn_mask), places, mode="wrap")
        found["attn_mask"] = numbers.reshape(1, 1, rows, case.seqlen_k)
    if asked.score_mod:
        found["score_mod"] = score_mod().on_host((), scalars_of(asked.softcap))
    else:
        found["softcap"] = asked.softcap
    if asked.mask_mod:
        found["mask_mod"] = mask_mod().on_host((documents(case.seqlen_k, asked.mask_mod),))
    return found
