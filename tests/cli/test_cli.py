"""The command line: what is compiled, what is rendered, what is printed, which exit status."""

import json
from argparse import ArgumentTypeError

import pytest

from fa3_cute.cli import COMMANDS, main, report
from fa3_cute.cli import compile as compile_command
from fa3_cute.cli.processes import spread
from fa3_cute.cli.options import one_or_more
from fa3_cute.cli.table import Table, markdown
from fa3_cute.planning.config import DecodeConfig, FwdConfig
from fa3_cute.planning.tables import all_forward_configs


# ---- main, tables, lists ---------------------------------------------------------------------------------------------


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said and summary.split()[0] in said for name, summary in COMMANDS.items())


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["no-such-command"],
        ["compile", "--head-dim", "84"],
        ["bench", "--peers", "fa9"],
        ["bench", "--causal", "--full"],
        ["compile", "--local", "--full"],
        ["report"],
        ["compile", "--out-dtype", "fp8_e4m3"],
        ["inspect", "--dtype", "fp8"],
    ],
)
def test_bad_command_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: fa3_cute" in capsys.readouterr().err


def test_lists():
    assert one_or_more(int)("1,2,3") == [1, 2, 3]
    for kind, choices, text in ((int, None, "1,x"), (int, None, ""), (int, (64, 128), "64,65"), (str, ("a",), "a,")):
        with pytest.raises(ArgumentTypeError):
            one_or_more(kind, choices)(text)


def test_table_aligns_and_keeps_wide_cells(capsys):
    table = Table([("name", 6), ("n", 3)])
    table.print_row(["a", 1])
    table.print_row(["a long name", 1000])
    assert capsys.readouterr().out == "name      n\na         1\na long name  1000\n"


# ---- compile ---------------------------------------------------------------------------------------------------------


def test_compile_prints_json_and_fills_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(tmp_path))
    from fa3_cute.runtime import compiler

    monkeypatch.setattr(compiler, "_kernels", {})
    assert main(["compile", "--head-dim", "64", "--dtype", "fp16", "--full", "--jobs", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["config"]["head_dim"], row["config"]["dtype"], row["config"]["is_causal"]) == (64, "fp16", False)
    assert row["problems"] == [] and row["stack_bytes"] == 0 and row["registers"] > 0 and row["wgmmas"] > 0
    assert [path for path in tmp_path.rglob("*") if row["name"] in path.name]


@pytest.mark.parametrize(
    "argv, count",
    [
        ([], 72),
        (["--causal"], 20),
        (["--local"], 32),
        (["--varlen"], 72),
        (["--decode"], 60),
        (["--decode", "--local", "--dtype", "fp16"], 10),
        (["--varlen", "--all", "--local"], 64),
        (["--head-dim", "64,96", "--dtype", "bf16"], 9),
        (["--dtype", "fp8_e4m3"], 30),
        (["--dtype", "fp8_e4m3", "--out-dtype", "fp16"], 15),
        (["--out-dtype", "bf16"], 57),
        (["--decode", "--dtype", "fp8_e4m3", "--head-dim", "128,256"], 8),
        (["--page-size", "16", "--dtype", "bf16"], 15),
        (["--page-size", "16", "--decode"], 60),
        (["--page-size", "0", "--all", "--head-dim", "128"], 36),
    ],
)
def test_compile_selects(argv, count, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(compile_command, "compile_row", lambda cfg: seen.append(cfg) or clean_row(cfg))
    assert main(["compile", "--jobs", "1", *argv]) == 0
    assert len(set(seen)) == len(seen) == count
    assert {isinstance(cfg, DecodeConfig) for cfg in seen} == (
        {True} if "--decode" in argv else {False, "--all" in argv and "--varlen" not in argv}
    )
    assert {cfg.is_varlen for cfg in seen if isinstance(cfg, FwdConfig)} == (
        set() if "--decode" in argv else {True} if {"--varlen", "--page-size"} & {*argv} else {False, "--all" in argv}
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"{count} kernels, all clean"


def clean_row(cfg) -> dict:
    return {
        "name": cfg.name,
        "registers": 168,
        "stack_bytes": 0,
        "smem_bytes": 1,
        "wgmmas": 32,
        "seconds": 1.0,
        "problems": [],
    }


def test_compile_fails_on_a_problem(monkeypatch, capsys):
    from fa3_cute.runtime import compiler

    def fails_or_spills(cfg):
        if cfg.is_causal:
            raise compiler.CompileError("does not lower")
        fields = {
            name: () if name == "warnings" else {} if name == "notes" else 1
            for name in compiler.Report.__dataclass_fields__
        }
        return compiler.Report(**fields | {"name": cfg.name, "config": cfg, "stack_bytes": 8})

    monkeypatch.setattr(compiler, "get_kernel", lambda cfg: None)
    monkeypatch.setattr(compiler, "compile_report", fails_or_spills)
    assert main(["compile", "--head-dim", "64", "--dtype", "fp16", "--jobs", "1"]) == 1
    *rows, summary = capsys.readouterr().out.splitlines()[1:]
    assert summary == "6 kernels, 6 with problems"
    assert any("spills" in row for row in rows) and any("does not lower" in row for row in rows)


def test_compile_in_processes(tmp_path, monkeypatch, capfd):
    """Rows come back from spawned processes in the order of the configs."""
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(tmp_path))
    configs = [
        cfg
        for cfg in all_forward_configs()
        if (cfg.dtype, cfg.head_dim, cfg.has_lse, cfg.mask) == ("fp16", 64, False, "full")
    ]
    rows = spread(compile_command.compile_row, configs, jobs=2)
    assert [row["name"] for row in rows] == [cfg.name for cfg in configs]


# ---- report ----------------------------------------------------------------------------------------------------------


def result(ms: float, **other) -> dict:
    return {"ms": ms, "tflops": 1 / ms, "peak": 0.5, "host_bound": False, "ratio": 1.0} | other


def case_row(head_dim: int, mask: str, **results) -> dict:
    case = {"dtype": "bf16", "head_dim": head_dim, "heads": "16:2", "layout": "2x512", "mask": mask}
    return {"case": case, "results": results}


RESULTS = {
    "environment": {
        "suite": "window",
        "command": "python -m fa3_cute bench --suite window",
        "gpu": "NVIDIA H200",
        "sms": 132,
        "clock_problem": "none to be had",
        "dsl": "4.8.1",
        "dsl_cuda": "12.9",
        "sources": "0123456789abcdef",
        "peers": {"fa3": "fa3-fwd 0.0.3"},
        "date": "2026-11-22T12:00:00",
    },
    "rows": [
        case_row(128, "causal", fa3_cute=result(0.002), fa3=result(0.0025, host_bound=True, ratio=1.25)),
        case_row(128, "window(9,0)", fa3_cute=result(0.001, peak=None)),
        case_row(64, "causal", fa3_cute=result(0.004)),
    ],
    "conclusions": ["it is so"],
}


def test_markdown():
    assert markdown(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_report_puts_masks_side_by_side(tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(RESULTS))
    assert main(["report", str(file)]) == 0
    said = capsys.readouterr().out
    assert "In a cell: causal / window(9,0)." in said and "- it is so\n" in said
    assert "\n| BF16 | 128 | 16:2 | 2x512 | 2.0 / 1.0 | 500.0 / 1000.0 | 50% / - | 400.0* / - | 1.25 / - |\n" in said
    assert "\n| BF16 | 64 | 16:2 | 2x512 | 4.0 / - | 250.0 / - | 50% / - | - / - | - / - |\n" in said
    for part in ("NVIDIA H200", "fa3-fwd 0.0.3", "2026-11-22", "\n    python -m fa3_cute bench --suite window\n"):
        assert part in said
    assert main(["report", "--head-dim", "64", str(file)]) == 0
    assert "| 128 |" not in capsys.readouterr().out


def test_report_replaces_its_part_of_a_document(tmp_path, capsys):
    results, document = tmp_path / "results.json", tmp_path / "document.md"
    results.write_text(json.dumps(RESULTS))
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        assert main(["report", "--into", str(document), str(results)]) == 0
        text = document.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n### ") and text.endswith(f"\n{report.END}\nafter\n")
        assert "old" not in text and text.count("it is so") == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "results, document",
    [("{}", None), ("not JSON", None), (None, None), (json.dumps(RESULTS), "no marks\n"), (json.dumps(RESULTS), None)],
)
def test_report_that_cannot_be(results, document, tmp_path, capsys):
    paths = tmp_path / "results.json", tmp_path / "document.md"
    for path, text in zip(paths, (results, document), strict=True):
        if text is not None:
            path.write_text(text)
    assert main(["report", "--into", str(paths[1]), str(paths[0])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("report: ")
    assert document is None or paths[1].read_text() == document
