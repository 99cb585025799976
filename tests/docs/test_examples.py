"""Every example runs, on any machine: on a Hopper GPU, or compiled and computed in NumPy without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forks import ForkServer

from fa3_cute.arrays.memory import hopper_device_problem

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NO_GPU = "No Hopper GPU here"


# Run before an example: an installation without the optional packages.
WITHOUT_EXTRAS = (
    "import runpy, sys\n"
    "class Absent:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name == 'ml_dtypes': raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
    "sys.meta_path.insert(0, Absent())\n"
    "import importlib.util\n"
    "found = importlib.util.find_spec\n"
    "importlib.util.find_spec = lambda name: None if name == 'ml_dtypes' else found(name)\n"
    "runpy.run_path(sys.argv[1], run_name='__main__')\n"
)


# Imported once for all examples, each of which runs in a process of its own.
IMPORTS = "import runpy, sys, numpy, fa3_cute.api, fa3_cute.runtime.compiler, fa3_cute.contract.reference"
EXAMPLE = "sys.argv[:], sys.path[0] = [{path!r}], {folder!r}; runpy.run_path({path!r}, run_name='__main__')"


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    server = ForkServer(IMPORTS, environment_of(tmp_path_factory.mktemp("kernels")) | {"OPENBLAS_NUM_THREADS": "1"})
    yield server
    server.close()


def environment_of(cache: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"FA3_CUTE_CACHE_DIR": str(cache), "PYTHONPATH": paths}


def run_example(path: Path, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, path], cwd=cache, env=environment_of(cache), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_without_a_gpu(path, process):
    if hopper_device_problem() is None:
        pytest.skip("this machine has a Hopper GPU: test_runs_on_a_gpu")
    status, printed = process.run(EXAMPLE.format(path=str(path), folder=str(path.parent)))
    assert status == 0, printed
    said, *rest = printed.splitlines()
    assert said.startswith(NO_GPU)
    assert any("sm_90a" in line and "registers" in line and " 0 bytes spilled" in line for line in rest)
    assert any("error" in line for line in rest)


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if "ml_dtypes" in path.read_text()], ids=lambda path: path.stem
)
def test_what_is_not_installed_is_one_sentence(path, tmp_path):
    """Of `pip install .` alone; the other examples need no more."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, path],
        env=os.environ | {"FA3_CUTE_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "This example needs the package ml_dtypes: pip install 'fa3_cute[dtypes]'\n"


@pytest.mark.gpu
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_on_a_gpu(path, tmp_path):
    said = run_example(path, tmp_path)
    assert NO_GPU not in said and "NVIDIA" in said and "error" in said


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_reads_in_one_go(path):
    assert path.read_text().count("\n") <= 110
