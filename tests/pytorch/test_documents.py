"""docs/pytorch.md: its snippets run, and it names the operators."""

import re
from pathlib import Path

import pytest
import torch
from tensors import ints, qkv, rand, rotary
from torch.nn import attention

from fa3_cute.torch import calls

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "pytorch.md").read_text()
SNIPPETS = re.findall(r"```py\n(.*?)```", TEXT, re.DOTALL)


def test_a_decode_step():
    q, *_ = qkv(seqlen_q=1)
    k_cache, v_cache, k, v = (rand(2, rows, 2, 64, seed=seed) for rows, seed in ((40, 1), (40, 2), (1, 3), (1, 4)))
    cos, sin = rotary().values()
    names = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cos": cos, "sin": sin}
    exec(SNIPPETS[0], names := names | {"cache_seqlens": ints(5, 9)})
    assert names["out"].shape == q.shape and torch.equal(v_cache[0, 5], v[0, 0])


@pytest.mark.skipif(not hasattr(attention, "register_flash_attention_impl"), reason="this torch has no registry")
def test_activation():
    exec(SNIPPETS[1], {})
    assert attention.current_flash_attention_impl() is None


def test_arguments_of_an_update():
    words = re.findall(r"`(\w+)`", TEXT.partition("`update_forward`")[2].partition("it says")[0])
    assert tuple(words) == calls.Update._fields
