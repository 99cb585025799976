"""docs/scores.md: its matrices are what the reference computes, and calls are served and refused as it says."""

import re
from dataclasses import replace

import numpy as np
import pytest
from documents import DENSE, NAMES, PACKED, ROOT, blocks, changed
from test_docs import assignments, drawn_by_reference, pictures
from test_docs_guides import rows

import fa3_cute
from fa3_cute.api import kernel_config
from fa3_cute.contract.block_mask import LISTS as ADDRESSES
from fa3_cute.contract.block_mask import BlockMask, block_sizes
from fa3_cute.contract.mods import MaskMod, ScoreMod
from fa3_cute.contract.philox import keep_mask
from fa3_cute.contract.reference import attention_reference

SCORES = ROOT / "docs" / "scores.md"
BLOCKS = dict(zip(("q_block", "kv_block"), block_sizes("fp16", DENSE.head_dim), strict=True))
LISTS = BlockMask(**dict.fromkeys(ADDRESSES, 1 << 20), **BLOCKS)
OPTIONS = ("is_causal", "window_size", "attention_chunk")


def all_keys(batch, head, query, key, info, aux):
    """A mask of nothing."""
    return key >= 0


def half(score, batch, head, query, key, info, aux):
    """A function of scores."""
    return score * 0.5


def visibilities(text: str):
    """The pictures of which keys rows see."""
    return [
        (options, sizes, lines)
        for options, sizes, lines in pictures(without_distances(text))
        if any(name.startswith(OPTIONS) for name in options)
    ]


def without_distances(text: str) -> str:
    return text.replace("abs(d - j)\nseqlen_q=", "abs(d - j)\nof ")


def wrong_pictures(text: str) -> list:
    return [picture for picture in visibilities(text) if picture[2] != drawn_by_reference(*picture[:2])]


def test_pictures_are_what_the_reference_computes():
    shown = [" ".join(sorted(options)) for options, _, _ in visibilities(SCORES.read_text())]
    assert len(shown) >= 10
    assert set(shown) == {
        "is_causal",
        "window_size_left window_size_right",
        "attention_chunk",
        "attention_chunk window_size_left window_size_right",
    }
    assert not wrong_pictures(SCORES.read_text())


def matrices(text: str, header: str) -> list[np.ndarray]:
    """The matrices side by side of the block that begins with this line, each in the column of its title."""
    (block,) = (block for block in blocks(text, "text") if block.startswith(header))
    lines = block.splitlines()
    titles = lines[1] if header == "abs(d - j)" else lines[0]
    starts = [i for i, c in enumerate(titles) if c != " " and (i == 0 or titles[i - 2 : i] == "  ")] + [None]
    numbers = lines[2:] if header == "abs(d - j)" else lines[1:]
    cut = [[line[start:stop].split() for line in numbers] for start, stop in zip(starts, starts[1:], strict=False)]
    return [np.array([row for row in part if row], int) for part in cut]


def masked_together(mask: np.ndarray) -> list[np.ndarray]:
    """Which keys each row sees under a causal mask, and under a boolean one besides, by the reference."""
    n_q, n_k = mask.shape
    zeros, one_hot = np.zeros((1, n_q, 1, 8)), np.eye(n_k)[None, :, None]
    q, k = zeros[..., :n_k], np.zeros((1, n_k, 1, n_k))
    outs = [attention_reference(q, k, one_hot, causal=True, **more)[0] for more in ({}, {"attn_mask": mask > 0})]
    return [(out[0, :, 0] > 0).astype(int) for out in outs]


def wrong_masks(text: str) -> bool:
    mask, *shown = matrices(text, "attn_mask ")
    return not all((a == b).all() for a, b in zip(shown, masked_together(mask), strict=True))


def test_a_boolean_mask_is_one_more_condition():
    mask, _, together = matrices(SCORES.read_text(), "attn_mask ")
    assert mask.shape == together.shape == (5, 5) and (together.sum(axis=1) == 0).any()
    assert not wrong_masks(SCORES.read_text())


def wrong_distances(text: str) -> bool:
    """Slopes of 1 leave the distances in the scores, which a single key's LSE shows."""
    found = []
    for matrix in matrices(text, "abs(d - j)"):
        n_q, n_k = matrix.shape
        q, k = np.zeros((1, n_q, 1, 8)), np.zeros((1, n_k, 1, 8))
        for j in range(n_k):
            lone = (np.arange(n_k) == j)[None, :]
            _, lse = attention_reference(q, k, k, alibi_slopes=[1.0], attn_mask=lone)
            found.append((-lse[0, 0] == matrix[:, j]).all())
    return not all(found)


def test_distances_are_alibi_s():
    assert [matrix.shape for matrix in matrices(SCORES.read_text(), "abs(d - j)")] == [(5, 5), (3, 5)]
    assert not wrong_distances(SCORES.read_text())


def wrong_bits(text: str) -> bool:
    (block,) = (block for block in blocks(text, "text") if block.startswith("p_dropout="))
    header, *lines = block.splitlines()
    p, seed, offset = (float(word.partition("=")[2]) for word in header.split())
    kept = keep_mask(p, int(seed), int(offset), 0, 0, range(len(lines)), range(len(lines)))
    return [" ".join(map(str, row.astype(int))) for row in kept] != lines


def test_dropped_weights_are_those_of_the_reference():
    assert not wrong_bits(SCORES.read_text())


@pytest.mark.parametrize(
    "old, new, is_wrong",
    [
        ("1 1 1 0 0                0 0 0 1 1", "1 1 1 0 0                0 0 1 1 1", wrong_pictures),
        ("window_size_left=2", "window_size_left=3", wrong_pictures),
        ("1 1 0 1 1    1 1 1 1 1    1 1 0 1 1", "1 1 0 1 1    1 1 1 1 1    1 1 1 1 1", wrong_masks),
        ("0 1 2 3 4                2 1 0 1 2", "0 1 2 3 4                3 2 1 0 1", wrong_distances),
        ("1 0 1 1 1\n1 1 1 1 1", "1 1 1 1 1\n1 1 1 1 1", wrong_bits),
    ],
)
def test_a_wrong_matrix_is_found(old, new, is_wrong):
    text = SCORES.read_text()
    assert old in text and is_wrong(text.replace(old, new, 1))


def refusals(text: str) -> list[tuple[str, int]]:
    return [(call.strip("`"), int(code)) for call, code in rows(text, "call", "code")]


def status_of(call: str, monkeypatch) -> int:
    """Of the dense call with this change, or of the packed one."""
    for name, value in (("MOD", MaskMod(all_keys)), ("LISTS", LISTS)):
        monkeypatch.setitem(NAMES, name, value)
    problems = fa3_cute.explain(changed(PACKED if "cu_seqlens_q" in call else DENSE, call))
    return int(problems[0].status) if problems else 0


def test_what_is_said_to_be_refused_is(monkeypatch):
    said = refusals(SCORES.read_text())
    assert len(said) >= 9
    assert said == [(call, status_of(call, monkeypatch)) for call, _ in said]


def test_what_is_said_to_be_refused_is_served_without(monkeypatch):
    """It is the named option that is refused, not the call around it."""
    assert status_of("mask_mod=MOD", monkeypatch) == status_of("block_mask=LISTS, mask_mod=MOD", monkeypatch) == 0
    assert status_of("attn_mask=scratch_ptr", monkeypatch) == 0


def test_what_rows_without_keys_have():
    """The table's sentences, by the reference."""
    text = SCORES.read_text()
    assert "| without a sink | 0 | -inf |" in text and "| with one | 0 | `s_aux[h]` |" in text
    q = k = np.zeros((1, 2, 1, 8))
    none = np.zeros((2, 2), bool)
    for sink, expected in ((None, -np.inf), ([3.0], 3.0)):
        out, lse = attention_reference(q, k, k + 1, attn_mask=none, s_aux=sink)
        assert (out == 0).all() and (lse == expected).all()


def test_two_keys_and_a_sink_share_a_row():
    assert "each weight is 1/3, and LSE = log 3" in SCORES.read_text()
    zeros = np.zeros((1, 2, 1, 8))
    out, lse = attention_reference(zeros, zeros, zeros + 1, s_aux=[0.0])
    assert np.allclose(out, 2 / 3) and np.allclose(lse, np.log(3))


def served(text: str) -> dict[str, tuple[str, ...]]:
    """Options by name: what has a kernel of its own for them; whether packed sequences, packed heads have them."""
    titles = "option", "a kernel of its own for", "packed sequences", "small windows with packed heads"
    return {name: tuple(cells) for first, *cells in rows(text, *titles) for name in re.findall(r"`(\w+)`", first)}


def serving(name: str) -> tuple[bool, bool, bool, bool]:
    """Whether an option changes the kernel, takes its registers, is served in packed sequences and by packed heads."""
    window = {"seqlen_q": 300, "num_heads": 16, "window_size_left": 63, "window_size_right": 0}
    dense, packed = (replace(params, **window) for params in (DENSE, PACKED))
    asked = [replace(params, **CALLS[name]) for params in (dense, packed)]
    config, without = kernel_config(asked[0]), kernel_config(dense)
    is_packed = not fa3_cute.explain(asked[1])
    return config != without, config.takes_registers, is_packed, config.packs_heads


CALLS = {
    "softcap": {"softcap": 30.0},
    "s_aux": {"s_aux": 1 << 20},
    "alibi_slopes": {"alibi_slopes": 1 << 20},
    "attn_mask": {"attn_mask": 1 << 20},
    "attention_chunk": {"attention_chunk": 128},
    "p_dropout": {"p_dropout": 0.1, "rng_state": 1 << 20},
    "score_mod": {"score_mod": ScoreMod(half)},
    "mask_mod": {"mask_mod": MaskMod(all_keys)},
    "block_mask": {"mask_mod": MaskMod(all_keys), "block_mask": LISTS},
}


def wrong_serving(text: str) -> list[str]:
    found = []
    for name, (kernel, packed, heads) in served(text).items():
        changes, takes_registers, is_packed, packs_heads = serving(name)
        said = not kernel.startswith("nothing"), "tiles of windows" in kernel, packed == "yes", heads == "yes"
        if said != (changes, takes_registers and name != "block_mask", is_packed, packs_heads):
            found.append(name)
    return found


def test_options_are_served_as_the_table_says():
    assert set(served(SCORES.read_text())) == set(CALLS)
    assert not wrong_serving(SCORES.read_text())


@pytest.mark.parametrize(
    "old, new",
    [
        ("| yes | yes |\n| `attn_mask`", "| yes | no |\n| `attn_mask`"),
        ("tiles of windows, in decode", "tiles, in decode"),
    ],
)
def test_a_wrong_table_of_options_is_found(old, new):
    text = SCORES.read_text()
    assert old in text and len(wrong_serving(text.replace(old, new, 1))) == 1


def test_lines_are_short():
    assert not [line for line in SCORES.read_text().splitlines() if len(line) > 120]
    assert assignments("a=1 b=False") == {"a": 1, "b": 0}
