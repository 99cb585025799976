"""A process whose CUDA is a fake that records: what the launch tests run their scripts in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory):
    """Folder of the fake driver and runtime."""
    if COMPILER is None:
        pytest.skip("needs a C compiler for the fake CUDA driver")
    folder = tmp_path_factory.mktemp("fake_cuda")
    library = folder / "libcute_dsl_runtime.so"
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-o", library, SUPPORT / "fake_cuda.c", "-ldl"], check=True)
    os.link(library, folder / "libcuda.so.1")  # one file under both names: one copy of its variables
    return folder


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory):
    """Folder of a disk cache that all tests share, those of other processes of the same run (xdist) too."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"


@pytest.fixture
def run(fake_cuda, kernel_cache):
    """run(script) -> what it told, in a process whose CUDA is the fake."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FA3_CUTE", "CUTE_DSL"))}
    libraries = f"{fake_cuda}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    environment = clean | {
        "LD_LIBRARY_PATH": libraries,
        "CUTE_DSL_LIBS": str(fake_cuda / "libcute_dsl_runtime.so"),
        "FA3_CUTE_CACHE_DIR": str(kernel_cache),
        "PYTHONPATH": f"{SUPPORT}:{SUPPORT.parents[1]}",
    }

    def run_script(script: str, **changes: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", "from fake_cuda import *\n" + script],
            env=environment | changes,
            text=True,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.split("RESULT")[1])

    return run_script
