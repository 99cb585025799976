"""Every example runs, on any machine: on a Hopper GPU, or compiled and computed in NumPy without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fa3_cute.arrays.memory import hopper_device_problem

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NO_GPU = "No Hopper GPU here"


def run_example(path: Path, cache: Path) -> str:
    environment = os.environ | {
        "FA3_CUTE_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [sys.executable, path], cwd=cache, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_without_a_gpu(path, tmp_path):
    if hopper_device_problem() is None:
        pytest.skip("this machine has a Hopper GPU: test_runs_on_a_gpu")
    said, *rest = run_example(path, tmp_path).splitlines()
    assert said.startswith(NO_GPU)
    assert any("sm_90a" in line and "registers" in line and " 0 bytes spilled" in line for line in rest)
    assert any("error" in line for line in rest)


@pytest.mark.gpu
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_on_a_gpu(path, tmp_path):
    said = run_example(path, tmp_path)
    assert NO_GPU not in said and "NVIDIA" in said and "error" in said


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_reads_in_one_go(path):
    assert path.read_text().count("\n") <= 110
