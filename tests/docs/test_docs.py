"""The documents say what the code does: tables of codes, fields, features and sizes, mask pictures, code, numbers."""

import ast
import inspect
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import fa3_cute
from fa3_cute import AttentionMode, DataType, FlashAttentionParams
from fa3_cute.cli import report
from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.contract.params import ARGUMENTS
from fa3_cute.planning.tables import all_decode_configs, all_forward_configs, decode_config
from fa3_cute.contract.reference import attention_reference
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.splits import is_decode, plan
from fa3_cute.contract.status import Status, shown
from fa3_cute.contract.plain import plain
from fa3_cute.contract.rules import PENDING

ROOT = Path(__file__).resolve().parents[2]
README, PACKAGE = ROOT / "README.md", ROOT / "fa3_cute"
CONTRACT = PACKAGE / "kernels" / "README.md"
API, API_ZH, KERNEL, PERFORMANCE = (
    ROOT / "docs" / name for name in ("api.md", "api.zh-CN.md", "kernel.md", "performance.md")
)
DOCUMENTS = sorted([README, CONTRACT, *(ROOT / "docs").glob("*.md")])
FIELDS = [(field.name, shown(field.default)) for field in fields(FlashAttentionParams)]

both_languages = pytest.mark.parametrize("page", [API, API_ZH], ids=lambda path: path.name)
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# ---- tables --------------------------------------------------------------------------------------------------------


def statuses_in(text: str) -> list[tuple[int, str]]:
    return [(int(code), name) for code, name in re.findall(r"^\| (0|-\d+) \| (\w+) \|", text, re.MULTILINE)]


def fields_in(text: str) -> list[tuple[str, str]]:
    """(field, default) in the order of the table; a row may name several fields that share a default."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `([^`]+)` \| [^|]*\| [^|]+\|$", text, re.MULTILINE)
    return [(name, default) for names, default in rows for name in re.findall(r"\w+", names)]


@both_languages
def test_status_table_is_complete_and_in_order(page):
    assert statuses_in(page.read_text()) == [(int(status), status.name) for status in Status]


@both_languages
def test_field_table_has_every_field_with_its_default(page):
    assert sorted(fields_in(page.read_text())) == sorted(FIELDS)


@pytest.mark.parametrize(
    "old, new",
    [
        ("| -9 | INVALID_ARGUMENT", "| -9 | INVALID_ARGUMENTS"),
        ("| -14 |", "| -41 |"),
        ("| -3 | FP8_HEAD_DIM |", "| - | FP8_HEAD_DIM |"),
    ],
)
@both_languages
def test_a_wrong_status_table_is_found(page, old, new):
    text = page.read_text()
    assert old in text and statuses_in(text.replace(old, new)) != statuses_in(text)


@pytest.mark.parametrize(
    "old, new",
    [
        ("| `is_causal` | `False`", "| `is_causal` | `True`"),
        ("`seqused_q`, ", ""),
        ("`DataType.FP16`", "`FP16`"),
        ("| `out` | `None`", "| `output` | `None`"),
    ],
)
@both_languages
def test_a_wrong_field_table_is_found(page, old, new):
    text = page.read_text()
    assert old in text and sorted(fields_in(text.replace(old, new))) != sorted(FIELDS)


# Words of a type column for what a field's description says; "" stands for a cell that is left empty.
ELEMENT_WORDS = {"input": "", "output": "", "bytes": "", "float32": "FP32", "int32": "int32"}


def wrong_descriptions(text: str) -> list[str]:
    """Fields whose row contradicts their description: the code of a refusal, or what a pointer points at."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `[^`]+` \| ([^|]*)\| ([^|]+) \|$", text, re.MULTILINE)
    told = [(name, kind.strip(), meaning) for names, kind, meaning in rows for name in re.findall(r"\w+", names)]
    return [name for name, kind, meaning in told if is_wrong(ARGUMENTS[name], kind, meaning)]


def is_wrong(argument, kind: str, meaning: str) -> bool:
    if argument.refused:
        return bool(kind) or re.findall(r"(?<!\w)-\d+", meaning) != [str(int(argument.refused))]
    said_elements = {word for word in ("FP32", "int32") if word in kind}
    return not kind or said_elements != ({ELEMENT_WORDS.get(argument.element, "")} - {""})


@both_languages
def test_field_table_agrees_with_the_descriptions(page):
    assert not wrong_descriptions(page.read_text())


@pytest.mark.parametrize(
    "old, new, field",
    [
        ("-14", "-15", "page_table"),
        ("int32 `[batch]`", "FP32 `[batch]`", "seqused_q"),
        ("| `workspace_bytes` | `0` | int", "| `workspace_bytes` | `0` | int32", "workspace_bytes"),
    ],
)
@both_languages
def test_a_wrong_description_is_found(page, old, new, field):
    text = page.read_text()
    assert old in text and field in wrong_descriptions(text.replace(old, new))


def test_attention_signature_matches_its_table():
    parameters = inspect.signature(fa3_cute.attention).parameters.values()
    true = {p.name: "" if p.default is p.empty else repr(p.default).replace("'", '"') for p in parameters}
    table = API.read_text().partition("| argument | default | meaning |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([\w, ]+?) \| ([^|]*?) ?\|", table, re.MULTILINE)
    assert {name: default for names, default in rows for name in names.split(", ")} == true


# ---- what is supported, and by which kernel ------------------------------------------------------------------------

POINTERS = {f"{name}_ptr": 1 << 20 for name in ("q", "k", "v", "out", "cu", "lse", "lengths", "scratch", "table")}
NAMES = POINTERS | {name: getattr(fa3_cute, name) for name in fa3_cute.__all__}
DENSE = FlashAttentionParams(
    q=1 << 20,
    k=1 << 20,
    v=1 << 20,
    out=1 << 20,
    dtype=DataType.FP16,
    batch_size=2,
    seqlen_q=1,
    seqlen_k=4096,
    num_heads=16,
    num_heads_k=2,
    head_dim=128,
)
PACKED = replace(
    DENSE, mode=AttentionMode.VARLEN_PREFILL, cu_seqlens_q=1 << 20, cu_seqlens_k=1 << 20, total_q=2, total_k=8192
)
YES = ("yes", "支持")


def changed(params: FlashAttentionParams, text: str) -> FlashAttentionParams:
    """With "field=value, ..." as a document writes it."""
    return replace(params, **eval(f"dict({text})", dict(NAMES)))


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
    assert {field for field, *_ in PENDING} == {change.partition("=")[0] for change, *said in rows if "-16" in said}
    assert not wrong_support(page.read_text())


@pytest.mark.parametrize(
    "old, new",
    [
        ("| `pack_gqa=True` | {} | -16 |", "| `pack_gqa=True` | {} | {} |"),
        ("| `num_splits=256` | {} | -16 |", "| `num_splits=256` | -16 | -16 |"),
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


# ---- the contract's tables -----------------------------------------------------------------------------------------


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


# ---- pictures of masks ---------------------------------------------------------------------------------------------


def pictures(text: str):
    """Yield (options, sizes, lines) for each matrix of each picture block: options over the block, sizes over a matrix.

    Matrices stand side by side; each begins in the column of its own `seqlen_q=`.
    """
    for block in blocks(text, "text"):
        options, *rest = block.splitlines()
        if not rest or not rest[0].startswith("seqlen_q="):
            continue
        starts = [match.start() for match in re.finditer("seqlen_q=", rest[0])] + [None]
        for start, stop in zip(starts, starts[1:], strict=False):
            header, *lines = (line[start:stop].strip() for line in rest)
            yield assignments(options), assignments(header), [line for line in lines if line]


def assignments(text: str) -> dict[str, int]:
    return {
        name: int(value == "True" or value != "False" and int(value))
        for name, value in (word.split("=") for word in text.split())
    }


def drawn_by_reference(options: dict, sizes: dict) -> list[str]:
    """What the reference attends to: with equal scores and one-hot V, out[i, j] is not 0 where query i sees key j."""
    n_q, n_k = sizes["seqlen_q"], sizes["seqlen_k"]
    used = {name: [sizes[name]] for name in ("seqused_q", "seqused_k") if name in sizes}
    window = options.get("window_size_left", -1), options.get("window_size_right", -1)
    zeros, one_hot = np.zeros((1, max(n_q, n_k), 1, n_k)), np.eye(n_k)[None, :, None]
    out, _ = attention_reference(
        zeros[:, :n_q], zeros[:, :n_k], one_hot, causal=bool(options.get("is_causal", 0)), window_size=window, **used
    )
    return [" ".join("-" if np.isnan(weight) else str(int(weight > 0)) for weight in row) for row in out[0, :, 0]]


@both_languages
def test_pictures_are_what_the_reference_computes(page):
    wrong = [
        (options, sizes, lines)
        for options, sizes, lines in pictures(page.read_text())
        if lines != drawn_by_reference(options, sizes)
    ]
    assert not wrong


@pytest.mark.parametrize(
    "page, masks",
    [
        (API, {"is_causal=1", "window_size_left=2 window_size_right=0", "window_size_left=1 window_size_right=1"}),
        (API_ZH, {"is_causal=1"}),
    ],
    ids=["api.md", "api.zh-CN.md"],
)
def test_pictures_show_every_relation_of_lengths(page, masks):
    shown_relations = {
        (
            " ".join(f"{name}={value}" for name, value in options.items()),
            int(np.sign(sizes["seqlen_q"] - sizes["seqlen_k"])),
        )
        for options, sizes, _ in pictures(page.read_text())
    }
    assert shown_relations >= {(mask, relation) for mask in masks for relation in (-1, 0, 1)}


@pytest.mark.parametrize(
    "old, new",
    [
        ("1 1 1 1 0 0  ", "1 1 1 0 0 0  "),
        ("- - - - - -", "0 0 0 0 0 0"),
        ("window_size_left=2", "window_size_left=3"),
        ("seqused_k=5", "seqused_k=6"),
    ],
)
def test_a_wrong_picture_is_found(old, new):
    text = API.read_text()
    assert old in text
    assert any(
        lines != drawn_by_reference(options, sizes) for options, sizes, lines in pictures(text.replace(old, new))
    )


# ---- code ----------------------------------------------------------------------------------------------------------


def faults(code: str) -> list[str]:
    """Names that a code block uses and the library does not have: imports, FlashAttentionParams' keywords."""
    known = {name for name, _ in FIELDS}
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "fa3_cute":
            found += [alias.name for alias in node.names if alias.name not in fa3_cute.__all__]
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("fa3_cute."):
            module = __import__(node.module, fromlist=["name"])
            found += [alias.name for alias in node.names if not hasattr(module, alias.name)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "FlashAttentionParams":
            found += [keyword.arg for keyword in node.keywords if keyword.arg not in {None, *known}]  # None: **fields
    return found


@every_document
def test_python_blocks_compile_and_name_what_exists(document):
    for code in blocks(document.read_text(), "python"):
        assert not faults(code), code


def test_there_are_python_blocks():
    assert all(len(blocks(page.read_text(), "python")) >= 5 for page in (API, API_ZH))


@pytest.mark.parametrize(
    "code",
    ["from fa3_cute import flash", "FlashAttentionParams(head_dims=64)", "from fa3_cute.arrays.memory import malloc"],
)
def test_a_wrong_block_is_found(code):
    assert faults(code)


@pytest.mark.parametrize("page, count", [(API, 3), (API_ZH, 4)], ids=["api.md", "api.zh-CN.md"])
def test_params_in_the_examples_are_valid_calls(page, count):
    """Those without strides of tensors: their pointers are names that any address can stand for."""
    calls = [
        node
        for code in blocks(page.read_text(), "python")
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "FlashAttentionParams"
    ]
    params = [
        eval(compile(ast.Expression(call), "example", "eval"), dict(NAMES))
        for call in calls
        if getattr(call.keywords[0].value, "id", "") in POINTERS
    ]
    assert len(params) == count
    assert [fa3_cute.explain(example) for example in params] == [[]] * count


def test_explanations_read_as_printed(capsys):
    code, printed = re.search(
        r"^```python\n([^`]*?in explain\([^`]*)```\n\nprints\n\n```text\n([^`]*)```", API.read_text(), re.MULTILINE
    ).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed


# ---- numbers --------------------------------------------------------------------------------------------------------


def quoted_numbers(text: str) -> set[str]:
    section = text.partition("\n## 性能优化建议\n")[2].partition("\n## ")[0]
    return set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", section))


def test_quoted_numbers_were_measured():
    """The advice quotes docs/performance.md; after a new measurement there, it has to quote that one."""
    quoted = quoted_numbers(API_ZH.read_text())
    measured = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", PERFORMANCE.read_text()))
    assert len(quoted) > 10 and not quoted - measured


@both_languages
def test_lines_are_short(page):
    assert not [line for line in page.read_text().splitlines() if len(line) > 120]
