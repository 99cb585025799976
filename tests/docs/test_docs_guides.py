"""docs/migration.md and docs/serving.md are true: fields, codes, variables, commands, numbers, and every snippet."""

import argparse
import ast
import inspect
import logging
import math
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

import fa3_cute
from fa3_cute import DataType, FlashAttentionParams, explain
from fa3_cute.cli import COMMANDS
from fa3_cute.contract.status import Status, shown
from fa3_cute.runtime.scratch import NUM_COUNTERS, SPACING

ROOT = Path(__file__).resolve().parents[2]
MIGRATION, SERVING = ROOT / "docs" / "migration.md", ROOT / "docs" / "serving.md"
DEFAULTS = {field.name: shown(field.default) for field in fields(FlashAttentionParams)}
ADDRESS = 1 << 20

both_guides = pytest.mark.parametrize("guide", [MIGRATION, SERVING], ids=lambda path: path.name)


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def rows(text: str, *titles: str) -> list[list[str]]:
    """The cells under these titles, from every table that has them all, in the order of the titles."""
    found, columns = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]] if line.startswith("|") else None
        if cells is None:
            columns = None
        elif columns is None:
            columns = [cells.index(title) for title in titles] if set(titles) <= set(cells) else []
        elif columns and set(cells[0]) != {"-"}:
            found.append([cells[column] for column in columns])
    return found


def names(cell: str) -> list[str]:
    """Fields that a cell names: the words in backquotes, before a "=" if there is one."""
    return re.findall(r"`(\w+)(?:=[^`]*)?`", cell)


# ---- migration: fields and codes -------------------------------------------------------------------------------------


def fields_named(text: str) -> list[str]:
    """Everywhere: in the tables' columns and in the C++ snippets."""
    in_tables = [name for (cell,) in rows(text, "FlashAttentionParams") for name in names(cell)]
    return in_tables + re.findall(r"\bparams\.(\w+)", "".join(blocks(text, "cpp")))


def test_fields_exist_and_none_is_missing():
    assert set(fields_named(MIGRATION.read_text())) == set(DEFAULTS)


def test_field_table_has_every_field_once_with_its_default():
    table = rows(MIGRATION.read_text(), "FlashAttentionParams", "default")
    assert sorted((*names(field), default.strip("`")) for field, default in table) == sorted(DEFAULTS.items())


def test_cpp_names_are_kept():
    for cpp, here in rows(MIGRATION.read_text(), "C++ field", "FlashAttentionParams"):
        assert not cpp or cpp.strip("`").split()[-1] == here.strip("`")


def statuses(text: str) -> list[tuple[int, str]]:
    return [(int(code), name) for code, name in rows(text, "code", "name")]


def test_status_table_is_the_enum():
    assert statuses(MIGRATION.read_text()) == [(int(status), status.name) for status in Status]


def asked_for(cell: str) -> FlashAttentionParams:
    """A good decode call with the fields of a cell like `num_splits=4`; names that end in _ptr are addresses."""
    known = {name: getattr(fa3_cute, name) for name in fa3_cute.__all__}
    known |= dict.fromkeys(re.findall(r"\w+_ptr", cell), ADDRESS)
    changes = eval(f"dict({cell.strip('`')})", known)
    good = dict.fromkeys(("q", "k", "v", "out"), ADDRESS) | {
        "batch_size": 4,
        "seqlen_q": 1,
        "seqlen_k": 2048,
        "num_heads": 16,
        "num_heads_k": 2,
        "head_dim": 128,
    }
    return FlashAttentionParams(**good | changes)


def test_what_is_said_to_work_works():
    works = [cell for _, cell in rows(MIGRATION.read_text(), "feature", "works with")]
    assert len(works) == 7
    assert {cell: explain(asked_for(cell)) for cell in works} == {cell: [] for cell in works}


def test_what_is_said_to_be_refused_is():
    refused = {cell: int(code) for cell, code in rows(MIGRATION.read_text(), "refused", "code")}
    assert len(refused) >= 7
    assert {cell: {problem.status for problem in explain(asked_for(cell))} for cell in refused} == {
        cell: {Status(code)} for cell, code in refused.items()
    }


def test_attention_arguments_exist():
    known = inspect.signature(fa3_cute.attention).parameters
    named = [name for (cell,) in rows(MIGRATION.read_text(), "`attention()`") for name in names(cell)]
    assert len(named) > 15 and set(named) <= set(known)


@pytest.mark.parametrize(
    "old, new",
    [
        ("| -9 | INVALID_ARGUMENT |", "| -9 | INVALID_ARGUMENTS |"),
        ("| -14 | PAGED", "| -41 | PAGED"),
        ("| -103 | NOT", "| -104 | NOT"),
    ],
)
def test_a_wrong_code_is_found(old, new):
    text = MIGRATION.read_text()
    assert old in text and statuses(text.replace(old, new)) != statuses(text)


@pytest.mark.parametrize(
    "old, new", [("| `rng_state` | `rng_state` |", "| `rng_state` | `rng` |"), ("params.head_dim", "params.headdim")]
)
def test_a_wrong_field_is_found(old, new):
    text = MIGRATION.read_text()
    assert old in text and set(fields_named(text.replace(old, new))) != set(DEFAULTS)


# ---- serving: variables, commands, numbers ---------------------------------------------------------------------------


def variables(text: str) -> set[str]:
    """Environment variables: words in capitals with a prefix that the library or the DSL uses."""
    return set(re.findall(r"\b(?:FA3_CUTE|CUTE_DSL|XDG)_[A-Z_]+\b", text))


def unread(text: str) -> set[str]:
    """Variables that no module of the package reads."""
    sources = "".join(path.read_text() for path in (ROOT / "fa3_cute").rglob("*.py"))
    return {name for name in variables(text) if f'"{name}"' not in sources}


def test_environment_variables_are_read():
    text = SERVING.read_text()
    assert variables(text) >= {"FA3_CUTE_CACHE_DIR", "FA3_CUTE_DISABLE_JIT"} and not unread(text)


def test_a_wrong_variable_is_found():
    assert unread(SERVING.read_text() + "FA3_CUTE_CACHE_FOLDER") == {"FA3_CUTE_CACHE_FOLDER"}


def commands(text: str) -> list[list[str]]:
    """Words of each quoted `python -m fa3_cute ...`."""
    return [line.split() for line in re.findall(r"python -m fa3_cute ([^`#\n]+)", text)]


def test_commands_parse():
    quoted = commands(SERVING.read_text())
    assert len(quoted) >= 4
    for name, *options in quoted:
        assert name in COMMANDS
        parser = argparse.ArgumentParser(exit_on_error=False)
        import_module(f"fa3_cute.cli.{name}").add_arguments(parser)
        parser.parse_args(options)


def test_numbers_of_counters():
    text = SERVING.read_text()
    assert f"{NUM_COUNTERS:,} counters" in text and f"one for every {SPACING // 4} arrival counts" in text
    assert f"| counters | {NUM_COUNTERS * SPACING >> 20} MB per context |" in text


def test_settings_in_the_key_are_all_listed():
    compiler = import_module("fa3_cute.runtime.compiler")
    assert set(compiler.CODE_SETTINGS) == {name for name in variables(SERVING.read_text()) if "DSL" in name}


# ---- snippets --------------------------------------------------------------------------------------------------------


def faults(code: str) -> list[str]:
    """Imports and keyword arguments in a snippet that the library does not have."""
    functions = {name: getattr(fa3_cute, name) for name in fa3_cute.__all__ if callable(getattr(fa3_cute, name))}
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "fa3_cute":
            found += [alias.name for alias in node.names if alias.name not in fa3_cute.__all__]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in {*functions, "replace"}:
            function = functions.get(node.func.id, FlashAttentionParams)
            known = inspect.signature(function).parameters
            found += [keyword.arg for keyword in node.keywords if keyword.arg and keyword.arg not in known]
    return found


@both_guides
def test_snippets_name_what_exists(guide):
    snippets = blocks(guide.read_text(), "python")
    assert len(snippets) >= 6
    for code in snippets:
        assert not faults(code), code


@pytest.mark.parametrize(
    "code",
    [
        "from fa3_cute import flash",
        "FlashAttentionParams(head_dims=64)",
        "attention(q, k, v, is_causal=True)",
        "replace(params, seqlens_k=1)",
        "warmup(params, streams=0)",
    ],
)
def test_a_wrong_snippet_is_found(code):
    assert faults(code)


class Tensor:
    """What a snippet uses of a PyTorch tensor."""

    def __init__(self, *shape: int):
        self.shape = shape

    def data_ptr(self) -> int:
        return ADDRESS

    def stride(self, dim: int) -> int:
        return math.prod(self.shape[dim + 1 :])


class Stream:
    """What a snippet uses of a cuda.core stream, its graph builder and its graph."""

    def itself(self, *_):
        return self

    create_graph_builder = begin_building = end_building = complete = launch = itself


@pytest.fixture
def calls(monkeypatch):
    """What snippets launch, here without a GPU: a call that would be refused returns its status."""
    made = []

    def launch(params, stream=None):
        assert isinstance(stream, Stream)
        problems = explain(params)
        made.append(params)
        return problems[0].status if problems else Status.OK

    def attention(q, k, v, *, out=None, stream=None, return_lse=False, **options):
        made.append(signature.bind(q, k, v, out=out, stream=stream, return_lse=return_lse, **options))
        return (q, k) if return_lse else q

    signature = inspect.signature(fa3_cute.attention)
    for name, stand_in in (("forward", launch), ("warmup", launch), ("attention", attention)):
        monkeypatch.setattr(fa3_cute, name, stand_in)
    return made


# What the snippets take as given: those of migration.md, by what they stand beside.
DENSE = {"q": Tensor(2, 5, 16, 128), "k": Tensor(2, 9, 2, 128), "v": Tensor(2, 9, 2, 128), "out": Tensor(2, 5, 16, 128)}
PACKED = {"q": Tensor(10, 16, 128), "k": Tensor(18, 2, 128), "v": Tensor(18, 2, 128), "out": Tensor(10, 16, 128)}
GIVEN = {
    **DENSE,
    "lse": Tensor(2, 16, 5),
    "k_cache": DENSE["k"],
    "v_cache": DENSE["v"],
    "cache_seqlens": Tensor(2),
    "cu_seqlens_q": Tensor(3),
    "cu_seqlens_k": Tensor(3),
    **{f"packed_{name}": PACKED[name] for name in "qkv"},
    **dict.fromkeys(("d_q", "d_k", "d_v", "d_out"), ADDRESS),
}


def run(guide: Path, **given) -> dict:
    """Run the snippets of a guide one after the other; the names that are left."""
    names = {**GIVEN, "stream": Stream(), **given}
    for code in blocks(guide.read_text(), "python"):
        names |= PACKED if "out = flash_attn_varlen_func" in code else DENSE
        exec(compile(code, guide.name, "exec"), names)
    return names


def test_migration_snippets_make_good_calls(calls):
    run(MIGRATION)
    params = [call for call in calls if isinstance(call, FlashAttentionParams)]
    assert [explain(call) for call in params] == [[]] * 5
    assert len(calls) - len(params) == 3  # of attention()
    prefill, decode, dense, packed, cache = params
    assert prefill.is_causal and prefill.num_heads_k == 16 and decode.num_heads_k == 2 and decode.seqlen_k == 2048
    assert (dense.q_row_stride, dense.k_row_stride, dense.q_batch_stride) == (2048, 256, 5 * 2048)
    assert (packed.batch_size, packed.total_q, packed.total_k) == (2, 10, 18)
    assert (cache.seqlen_q, cache.seqlen_k, cache.dtype) == (5, 9, DataType.BF16)


@pytest.fixture
def quiet(monkeypatch):
    """The snippet about logging leaves no trace."""
    logger = logging.getLogger("fa3_cute")
    level = logger.level
    monkeypatch.setattr(logging, "basicConfig", lambda: None)
    yield
    logger.setLevel(level)


def test_serving_snippets_run(calls, quiet):
    good, split = asked_for("`seqlen_k=8192`"), asked_for("`num_splits=128`")
    names = run(SERVING, params=good)
    names["warm_up"](names["stream"], (1, 64), 4096)
    names["attend"](good, [(ADDRESS, 2 * ADDRESS, ADDRESS, ADDRESS)] * 2, names["stream"])
    assert [explain(call) for call in calls] == [[]] * 7
    assert names["largest_workspace"]([good, split]) == max(map(fa3_cute.workspace_size, (good, split))) > 0
    bounded = names["bounded"](good, 1024, 8192)
    assert (bounded.seqlen_k, bounded.k_batch_stride) == (1024, 8192 * 2 * 128) and explain(bounded) == []
    paged_step(names)
    softcap = asked_for("`softcap=-1.0`")
    assert len(names["reasons"](softcap)) == 1
    said: list[str] = []
    assert not names["launch_or_report"](softcap, names["stream"], said.append) and len(said) == 1
    assert names["launch_or_report"](good, names["stream"], said.append) and len(said) == 1


def paged_step(names: dict) -> None:
    """What the snippets make of an engine's tensors; K and V side by side, a slice of the table."""
    packed = Tensor(9, 16, 128)
    k, v = Pool(40, 16, 2, 128), Pool(40, 16, 2, 128)
    table = Tensor(3, 8)
    given = packed, k, v, packed, Tensor(4), Tensor(3), table
    call = names["step"](*given, max_seqlen_q=4, zero_padding=True)
    assert explain(call) == [] and (call.is_causal, call.window_size_left, call.window_size_right) == (True, -1, -1)
    assert (call.page_size, call.num_pages, call.seqlen_k, call.batch_size, call.total_q) == (16, 40, 128, 3, 9)
    assert (call.k_batch_stride, call.k_row_stride, call.k_head_stride) == (16 * 512, 512, 256)
    windowed = names["step"](*given, window_size=(63, -1))
    assert explain(windowed) == [] and (windowed.window_size_left, windowed.window_size_right) == (63, 0)


class Pool(Tensor):
    """K or V of a pool that has both side by side."""

    def stride(self, dim: int) -> int:
        return super().stride(dim) * (1 if dim == 3 else 2)


@both_guides
def test_lines_are_short(guide):
    assert not [line for line in guide.read_text().splitlines() if len(line) > 120]
