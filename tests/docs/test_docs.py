"""Pictures of masks, code blocks and quoted numbers in the documents are right."""

import ast
import re

import numpy as np
import pytest
from documents import API, API_ZH, PERFORMANCE, FIELDS, both_languages, every_document, blocks, POINTERS, NAMES

import fa3_cute
from fa3_cute.contract.reference import attention_reference


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
    asked = {"causal": bool(options.get("is_causal", 0)), "attention_chunk": options.get("attention_chunk", 0)}
    out, _ = attention_reference(zeros[:, :n_q], zeros[:, :n_k], one_hot, window_size=window, **asked, **used)
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
        (
            API,
            {
                "is_causal=1",
                "attention_chunk=3 is_causal=1",
                "window_size_left=2 window_size_right=0",
                "window_size_left=1 window_size_right=1",
            },
        ),
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


@pytest.mark.parametrize("page, count", [(API, 4), (API_ZH, 4)], ids=["api.md", "api.zh-CN.md"])
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


# ---- numbers -------------------------------------------------------------------------------------------------------


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
