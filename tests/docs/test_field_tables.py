"""The tables of statuses, fields and arguments, in both languages, say what the code does."""

import inspect
import re

import pytest
from documents import API, API_ZH, FIELDS, both_languages

import fa3_cute
from fa3_cute.contract.params import ARGUMENTS
from fa3_cute.contract.status import Status


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


# What a row must say of its field's description.
ELEMENT_WORDS = {"float32": "FP32", "int32": "int32"}
KIND_WORDS = {
    "pointer": {"pointer", "指针"},
    "size": {"int"},
    "count": {"int"},
    "stride": {"int"},
    "number": {"number", "float"},
    "flag": {"bool"},
    "choice": {"DataType", "AttentionMode"},
    "object": {"ScoreMod", "MaskMod", "BlockMask", "tuple"},
}


def wrong_descriptions(text: str) -> list[str]:
    """Fields whose row contradicts their description: kind, element, alignment."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `[^`]+` \| ([^|]*)\| ([^|]+) \|$", text, re.MULTILINE)
    told = [(name, kind.strip(), meaning) for names, kind, meaning in rows for name in re.findall(r"\w+", names)]
    return [name for name, kind, meaning in told if is_wrong(ARGUMENTS[name], kind, meaning)]


def is_wrong(argument, kind: str, meaning: str) -> bool:
    words = set(re.findall(r"[A-Za-z]\w*|指针", kind.partition("`")[0]))
    alignments = [int(number) for number in re.findall(r"(\d+)(?:-byte aligned| 字节对齐)", kind)]
    element = ELEMENT_WORDS.get(argument.element)
    return not (
        words & {word for kinds in KIND_WORDS.values() for word in kinds}
        in ({word} for word in KIND_WORDS[argument.kind])
        and words & set(ELEMENT_WORDS.values()) == ({element} if element else set())
        and alignments == [number for number in (argument.alignment,) if number > 1]
        and (not argument.is_fp8 or "FP8" in meaning)
    )


@both_languages
def test_field_table_agrees_with_the_descriptions(page):
    assert not wrong_descriptions(page.read_text())


@pytest.mark.parametrize(
    "old, new, field",
    [
        ("`leftpad_k` | `None` | {}int32", "`leftpad_k` | `None` | {}FP32", "leftpad_k"),
        ("`page_table` | `None` | {}int32", "`page_table` | `None` | {}FP32", "page_table"),
        ("| `workspace_bytes` | `0` | int", "| `workspace_bytes` | `0` | int32", "workspace_bytes"),
        ("| `workspace_bytes` | `0` | int", "| `workspace_bytes` | `0` | bool", "workspace_bytes"),
        ("`seqused_k` | `None` | {}int32", "`seqused_k` | `None` | {}FP32", "seqused_q"),
        ("`seqused_k` | `None` | {}int32", "`seqused_k` | `None` | int32", "seqused_q"),
        ("`v` | `None` | {}16", "`v` | `None` | {}8", "k"),
        ("| `is_causal` | `False` | bool", "| `is_causal` | `False` | int", "is_causal"),
        ("FP8", "FP6", "q_descale_head_stride"),
    ],
)
@both_languages
def test_a_wrong_description_is_found(page, old, new, field):
    text, pointer = page.read_text(), "指针，" if page == API_ZH else "pointer, "
    old, new = old.format(pointer), new.format(pointer)
    assert old in text and field in wrong_descriptions(text.replace(old, new))


def test_attention_signature_matches_its_table():
    parameters = inspect.signature(fa3_cute.attention).parameters.values()
    true = {p.name: "" if p.default is p.empty else repr(p.default).replace("'", '"') for p in parameters}
    table = API.read_text().partition("| argument | default | meaning |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([\w, ]+?) \| ([^|]*?) ?\|", table, re.MULTILINE)
    assert {name: default for names, default in rows for name in names.split(", ")} == true
