"""docs/diagnosis.md: its variables are read, its line is a call, its counts are what stats() has."""

import ast
import re
from pathlib import Path

from fa3_cute import explain, stats
from fa3_cute.api import kernel_config
from fa3_cute.cli import main
from fa3_cute.cli.replayed import stood_in
from fa3_cute.runtime.tracing.record import fields_of, params_of, parsed

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "diagnosis.md").read_text()
SOURCES = "".join(path.read_text() for path in (ROOT / "fa3_cute" / "runtime" / "tracing").glob("*.py"))


def variables(text: str) -> set[str]:
    return set(re.findall(r"\bFA3_CUTE_[A-Z_]+\b", text))


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_variables_are_those_that_are_read():
    table = re.findall(r"^\| `(FA3_CUTE_\w+)` \|", TEXT, re.MULTILINE)
    assert set(table) == variables(TEXT) == variables(SOURCES) and len(table) == 4


def test_the_line_is_a_call():
    (line,) = blocks(TEXT, "json")
    record = parsed(line)
    assert record is not None
    params = stood_in(params_of(record))
    assert explain(params) == [] and fields_of("forward", params) == record["fields"]
    assert kernel_config(params).name == "decode_bf16_d128_full_64x64"


def test_counts_are_those_of_stats():
    (shown,) = blocks(TEXT, "text")
    rows = re.findall(r"^\| `(\w+)` \|", TEXT.partition("## Counts")[2], re.MULTILINE)
    assert list(ast.literal_eval(shown)) == rows == list(stats())


def test_what_replay_prints(tmp_path, capsys):
    """The page of commands shows the output of a good prefill, a refused decode and a good one."""
    fields = (
        '"q": 256, "k": 256, "v": 256, "out": 256, "batch_size": 2, "num_heads": 16, "head_dim": 128, "dtype": "BF16"'
    )
    one = '"seqlen_q": 1, "seqlen_k": 4096, "softmax_lse": 4, "mode": "DECODE", "num_splits": 16'
    more = (
        '"seqlen_q": 512, "seqlen_k": 4096, "num_heads_k": 2, "is_causal": true',
        f'{one}, "num_heads_k": 3, "is_causal": true',
        f'{one}, "num_heads_k": 2',
    )
    log = tmp_path / "calls.log"
    log.write_text("".join(f'{{"fa3_cute": "forward", "fields": {{{fields}, {each}}}}}\n' for each in more))
    assert main(["replay", str(log), "--explain"]) == 1
    section = (ROOT / "docs" / "command-line.md").read_text().partition("\n## replay\n")[2]
    assert [capsys.readouterr().out] == blocks(section, "text")
