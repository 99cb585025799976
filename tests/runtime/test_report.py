"""compile_report: what the compiler made of a config, and what of it must not ship."""

import json
from dataclasses import replace

import pytest

from fa3_cute.planning.tables import forward_config
from fa3_cute.runtime import compiler, report

CFG = forward_config("bf16", 64, "causal", True, False)


def test_report_shows_what_a_bad_compile_costs(monkeypatch):
    def unoptimised(cfg, options, good=report.compile_config):
        return good(cfg, options + " --opt-level 0")

    monkeypatch.setattr(report, "compile_config", unoptimised)
    found = compiler.compile_report(CFG)
    assert found.stack_bytes > 0 and found.spill_stores > 0 and found.spill_load_bytes > 0
    problems = " ".join(found.problems())
    assert "spills" in problems and "serialised" in problems
    assert json.loads(json.dumps(found.as_dict()))["config"]["head_dim"] == 64


def test_report_problems_name_each_rule():
    good = compiler.Report(CFG.name, CFG, 128, 0, 0, 0, 0, 0, CFG.smem_bytes, 48, 2, 2000, (), {}, 2.0)
    assert good.problems() == []
    for change in (
        {"stack_bytes": 8},
        {"spill_loads": 1},
        {"smem_bytes": CFG.smem_bytes + 1},
        {"wgmmas": 0},
        {"setmaxnregs": 0},
        {"warnings": ("C7508: setmaxnreg is ignored",)},
    ):
        assert len(replace(good, **change).problems()) == 1


def test_remarks_without_facts_are_an_error():
    with pytest.raises(compiler.CompileError, match="remarks"):
        report._parse_remarks("fwd", "ptxas info : nothing of interest")


def test_remarks_are_told_apart():
    remarks = report._parse_remarks(
        "fwd",
        """'Shared memory allocated: 197632 bytes'
        (C7508) setmaxnreg ignored
        (C7517) wait injected around line 1  (C7517) wait injected around line 2
        16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads""",
    )
    assert remarks["smem_bytes"] == 197632 and remarks["notes"] == {"C7517": 2}
    assert (remarks["stack_bytes"], remarks["spill_store_bytes"], remarks["spill_load_bytes"]) == (16, 24, 32)
    (warning,) = remarks["warnings"]
    assert warning.startswith("C7508")
