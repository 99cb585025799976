"""How commands end: bad options, what cannot run, closed pipes, Ctrl-C; and what is said where."""

import os
import signal
import subprocess
import sys
import time

import pytest
from commands import running

import fa3_cute
from fa3_cute.cli import main
from fa3_cute.cli.options import counted
from fa3_cute.arrays.memory import hopper_device_problem

COMMAND = [sys.executable, "-m", "fa3_cute"]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fa3_cute {fa3_cute.__version__}\n"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["bench", "--rounds", "0"], "0: must be at least 1"),
        (["bench", "--seqlen", "512,0"], "0: must be at least 1"),
        (["bench", "--batch-size", "-1"], "-1: must be at least 1"),
        (["bench", "--num-heads", "0"], "must be at least 1"),
        (["bench", "--num-heads-k", "0"], "must be at least 1"),
        (["bench", "--batch-ms", "0"], "0: must be positive and finite"),
        (["bench", "--batch-ms", "nan"], "nan: must be positive and finite"),
        (["bench", "--settle-ms", "-1"], "-1: must be positive and finite"),
        (["bench", "--rounds", "9" * 5000], "must be an int"),
        (["compile", "--jobs", "0"], "0: must be at least 1"),
        (["dev", "--seqlen", "0"], "0: must be at least 1"),
        (["tune", "--limit", "-1"], "-1: must be at least 1"),
        (["tune", "--jobs", "0"], "0: must be at least 1"),
        (["tune", "--rounds", "0"], "0: must be at least 1"),
        (["tune", "--seqlen", "0"], "0: must be at least 1"),
        (["tune", "--batch-ms", "inf"], "inf: must be positive and finite"),
        (["tune", "--tile-n", "7"], "7: must be one of 32, 48, 64"),
        (["tune", "--tile-m", "7"], "7: must be one of 64, 128, 192"),
        (["explain", "--batch-size", "x"], "invalid int value"),
        (["bench", "--json", "no-such-folder/a.json"], "must be a file in a folder that can be written to"),
        (["bench", "--plot", "no-such-folder/a.png"], "must be a file in a folder that can be written to"),
        (["report", "--plot", ".", "a.json"], "must be a file in a folder that can be written to"),
    ],
)
def test_a_number_out_of_range_is_a_bad_option(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.err and f"argument {argv[1]}: " in printed.err and not printed.out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["compile", "--backward", "--dtype", "fp8_e4m3"], "there are no such kernels"),
        (["compile", "--backward", "--dtype", "fp8_e4m3", "--json"], "there are no such kernels"),
        (["inspect", "--dtype", "bf16", "--out-dtype", "fp16", "--json"], "only fp8_e4m3 has a choice"),
        (["dev", "--decode", "--local"], "--decode times a query that sees every key"),
        (["tune", "--out-dtype", "fp16"], "only fp8_e4m3 has a choice"),
        (["bench", "--num-heads", "3", "--num-heads-k", "2"], "the query heads must be a multiple of the KV heads"),
        (
            ["bench", "--suite", "fp8cache", "--dtype", "fp8_e4m3"],
            "there are no kernels for fp8_e4m3 over fp8_e4m3 d64",
        ),
        (["report", "no-such-file.json"], "report: FileNotFoundError"),
        (["bench", "--plot", "picture.txt"], "the name must end in one of "),
    ],
)
def test_what_cannot_run_says_so_on_stderr(argv, said, capsys):
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


def test_plurals():
    assert [counted(number, "kernel") for number in (0, 1, 2)] == ["0 kernels", "1 kernel", "2 kernels"]


@pytest.mark.parametrize("argv", [["explain"], ["explain", "--json"]], ids=" ".join)
def test_a_closed_pipe_is_no_error(argv):
    """Nobody reads: as with `| true`. No traceback, and the status of a program that SIGPIPE ended."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, *argv], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 128 + signal.SIGPIPE


def test_ctrl_c_ends_workers_too(tmp_path):
    """In the terminal it goes to the whole group: one line, status 130, no process left."""
    process = subprocess.Popen(
        [*COMMAND, "compile", "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"FA3_CUTE_CACHE_DIR": str(tmp_path)},
        start_new_session=True,
    )
    process.stdout.readline()  # the heading
    process.stdout.readline()  # the first kernel: the workers work
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted\n")
    deadline = time.monotonic() + 30
    while process.pid in running().values() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.pid not in running().values()


@pytest.mark.skipif(hopper_device_problem() is None, reason="this machine has a Hopper GPU")
def test_results_and_reasons_do_not_mix(capsys):
    assert main(["bench", "--json", "unwritten.json"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("bench needs a Hopper GPU: ") and not printed.out
