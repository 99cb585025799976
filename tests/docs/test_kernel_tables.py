"""The tables of what is supported, by which kernel, and of shared memory say what the code does."""

import re

import pytest
from documents import README, CONTRACT, API, API_ZH, KERNEL, PERFORMANCE, both_languages, DENSE, PACKED, changed

import fa3_cute
from fa3_cute import FlashAttentionParams
from fa3_cute.cli import report
from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.planning.tables import all_decode_configs, all_forward_configs, all_packed_configs, decode_config
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.splits import is_decode, plan
from fa3_cute.contract.plain import plain


YES = ("yes", "支持")


def support_in(text: str) -> list[tuple[str, str, str]]:
    """(change, dense, packed) of the support matrix; a status that is not an error is "yes" in the page's language."""
    return re.findall(rf"^\| `(\w+=[^`]*)` \| ({'|'.join(YES)}|-\d+) \| ({'|'.join(YES)}|-\d+) \|$", text, re.MULTILINE)


def answer(params: FlashAttentionParams) -> int:
    """The status that `forward` would return for what is wrong with the params, 0 if nothing is."""
    return next((int(problem.status) for problem in fa3_cute.explain(params)), 0)


def wrong_support(text: str) -> list[tuple[str, str, str]]:
    return [
        row
        for row in support_in(text)
        if any(
            (0 if said in YES else int(said)) != answer(changed(params, row[0]))
            for said, params in zip(row[1:], (DENSE, PACKED), strict=True)
        )
    ]


@both_languages
def test_support_matrix_is_what_calls_get(page):
    rows = support_in(page.read_text())
    assert {
        "num_splits=1",
        "num_splits=2",
        "pack_gqa=True",
        "mode=AttentionMode.DECODE",
        "dtype=DataType.FP8_E4M3",
    } <= {change for change, _, _ in rows}
    assert not wrong_support(page.read_text())


@pytest.mark.parametrize(
    "old, new",
    [
        ("| `pack_gqa=True` | {0} | {0} |", "| `pack_gqa=True` | {0} | -16 |"),
        ("| `num_splits=256` | {0} | {0} |", "| `num_splits=256` | -13 | {0} |"),
        ("| `num_splits=257` | -13 |", "| `num_splits=257` | {} |"),
    ],
)
@both_languages
def test_a_wrong_support_matrix_is_found(page, old, new):
    text, yes = page.read_text(), YES[page == API_ZH]
    assert old.format(yes) in text and len(wrong_support(text.replace(old.format(yes), new.format(yes, yes)))) == 1


@pytest.mark.parametrize("kernel, count", [("decode", 6), ("prefill", 3)])
def test_calls_get_the_kernel_that_the_table_names(kernel, count):
    calls = re.findall(rf"^\| `([^`]*)` \| {kernel} \|$", API.read_text(), re.MULTILINE)
    assert len(calls) == count
    shapes = {call: ProblemShape.of(plain(changed(DENSE, call))) for call in calls}
    assert not [call for call, shape in shapes.items() if is_decode(shape) != (kernel == "decode")]
    assert not [call for call in calls if fa3_cute.explain(changed(DENSE, call))]


def test_plans_in_the_table_are_the_planner_s():
    rows = re.findall(r"^\| (\d+)x(\d+), (\d+):(\d+) \| (\d+) \| (\d+) \| (\d+) \|$", KERNEL.read_text(), re.MULTILINE)
    assert len(rows) >= 5
    cfg = decode_config("bf16", 128, False)
    for batch, keys, heads, heads_k, *said in (map(int, row) for row in rows):
        chosen = plan(cfg, batch, 1, keys, heads, heads_k, 2 * UNBOUNDED_WINDOW + 1, (None, 0))
        assert said == [chosen.num_splits, chosen.cluster_size, batch * heads_k * chosen.num_splits]


def forward_memory() -> set[tuple[str, ...]]:
    """(head_dim, mask, tile, Q/O ring, K ring, V ring, all) of every config."""
    return {
        (
            str(cfg.head_dim),
            cfg.mask,
            f"{cfg.tile_m}x{cfg.tile_n}",
            f"{cfg.num_q_stages} x {row_bytes(cfg) * cfg.tile_m}",
            *kv_rings(cfg),
            str(cfg.smem_bytes),
        )
        for cfg in all_forward_configs()
    }


def decode_memory() -> set[tuple[str, ...]]:
    """(head_dim, tile, Q, K ring, V ring, all, sPartial, CTAs per SM) of every config."""
    return {
        (
            str(cfg.head_dim),
            f"{cfg.tile_m}x{cfg.tile_n}",
            str(row_bytes(cfg) * cfg.tile_m),
            *kv_rings(cfg),
            str(cfg.smem_bytes),
            str(cfg.partial_bytes),
            str(cfg.ctas_per_sm),
        )
        for cfg in all_decode_configs()
    }


def row_bytes(cfg) -> int:
    return cfg.kv_bytes_per_token // 2


def kv_rings(cfg) -> tuple[str, str]:
    return (f"{cfg.num_kv_stages} x {row_bytes(cfg) * cfg.tile_n}",) * 2


def memory_in(text: str) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """The rows of the contract's two tables, as forward_memory and decode_memory have them."""
    forward = re.findall(r"^\| (\d+) ([a-z, ]+)" + r" \| ([\dx ]+)" * 5 + r" \|$", text, re.MULTILINE)
    decode = re.findall(r"^\| (\d+)" + r" \| ([\dx ]+)" * 7 + r" \|$", text, re.MULTILINE)
    return {(head_dim, mask, *rest) for head_dim, masks, *rest in forward for mask in masks.split(", ")}, set(decode)


def test_shared_memory_tables_are_the_configs():
    assert memory_in(CONTRACT.read_text()) == (forward_memory(), decode_memory())


def test_the_shared_memory_table_of_packed_heads_is_the_configs():
    rows = re.findall(r"^\| (\d+), (\d)" + r" \| ([\dx ]+)" * 5 + r" \|$", CONTRACT.read_text(), re.MULTILINE)
    assert set(rows) == {
        (
            str(cfg.head_dim),
            str(cfg.packed_heads),
            f"{cfg.tile_m}x{cfg.tile_n}",
            f"{cfg.num_q_stages} x {row_bytes(cfg) * cfg.tile_m}",
            *kv_rings(cfg),
            str(cfg.smem_bytes),
        )
        for cfg in all_packed_configs()
    }


@pytest.mark.parametrize(
    "old, new",
    [
        ("| 115712 | 40960 | 2 |", "| 115712 | 40960 | 1 |"),
        ("4 x 12288", "3 x 12288"),
        ("| 222208 | 614", "| 222207 | 614"),
        ("| 128 causal, local |", "| 128 causal |"),
    ],
)
def test_a_wrong_shared_memory_table_is_found(old, new):
    text = CONTRACT.read_text()
    assert old in text and memory_in(text.replace(old, new)) != (forward_memory(), decode_memory())


@pytest.mark.parametrize("document", [README, PERFORMANCE], ids=lambda path: path.name)
def test_decode_tables_have_a_place_of_their_own(document):
    text = document.read_text()
    filled = report.updated(text, [("decode", "### Decode tables")])
    assert "<!-- performance of decode: begin -->\n### Decode tables\n<!-- performance of decode: end -->" in filled
    assert (
        filled.partition(report.BEGIN)[2].partition(report.END)[0]
        == text.partition(report.BEGIN)[2].partition(report.END)[0]
    )
