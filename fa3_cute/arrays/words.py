"""The words of the rules, which speak of FlashAttentionParams, as attention() has them. Pure Python."""

import re

from ..contract.params import names
from ..contract.status import FlashAttentionError, Problem, error_for

_ADDRESSES = "|".join(name.removesuffix("_ptr") for name in names(kind="pointer"))
# In this order.
_WORDS = (
    (r"\bis_causal\b", "causal"),
    (r"\bwindow_size_left=", "window_size[0]="),
    (r"\bwindow_size_right=", "window_size[1]="),
    (r"\b([qkv]_descale)_ptr\b", r"\1"),
    (r"\bp_dropout\b", "dropout_p"),
    (
        r"\bv=\w+: must be k, the same address, (.*): V is the first (\d+) .*",
        r"v: must be k[..., :\2], the same memory, \1",
    ),
    # An address is not what was given; of one that is misaligned, in hexadecimal, it is what is wrong.
    (rf"\b({_ADDRESSES})=\d+: must be ", r"\1: must be "),
    (rf"\b((?:{_ADDRESSES}|score_mod|mask_mod)(?:=.*)?: must be None) or 0\b", r"\1"),
    (r"\brng_state: must be a device", "rng_state=None: must be a device"),
    (r"\bmust be a device address(?! aligned)", "must be an array"),
    (r"\bgive it in 16 bit, kv_new_dtype=\w+", "give it in 16 bit, of q's type"),
    (r"\b([qkv]|out|[qkv]_descale|q_v|[kv]_new|attn_mask|page_table)_(batch|row|head)_stride=", r"\1's \2 stride="),
    (r"\brotary_row_stride=", "rotary_cos's row stride="),
    (r"\balibi_batch_stride=", "alibi_slopes's batch stride="),
    (r"\bseqlen_knew=", "rows of k_new="),
    (r"\bmod_pointers=.*: must be (\d+) device addresses", r"mod_arrays: must be \1 arrays"),
    (r"\bmod_pointers=.*: must be int device addresses, the one at (\d+) aligned", r"mod_arrays[\1]: must be aligned"),
    (
        r"\bmod_strides=(.*): must be None \(contiguous\) or (\d+) ints",
        r"the strides of mod_arrays=\1: must be \2 ints",
    ),
)


def refusal(problem: Problem) -> FlashAttentionError:
    """The problem of a call's params as the error of attention()."""
    sentence = problem.detail
    for theirs, ours in _WORDS:
        sentence = re.sub(theirs, ours, sentence)
    return error_for(problem.status, sentence)
