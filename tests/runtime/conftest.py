"""A process whose CUDA is a fake that records: what the launch tests run their scripts in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forks import SECONDS, ForkServer

SUPPORT = Path(__file__).parents[1] / "support"
NAMES = "from fake_cuda import *\n"
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


@pytest.fixture(scope="session")
def fake_environment(fake_cuda, kernel_cache):
    """Of a process whose CUDA is the fake; nothing else in it has to do with this package or the DSL."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FA3_CUTE", "CUTE_DSL"))}
    libraries = f"{fake_cuda}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return clean | {
        "LD_LIBRARY_PATH": libraries,
        "CUTE_DSL_LIBS": str(fake_cuda / "libcute_dsl_runtime.so"),
        "FA3_CUTE_CACHE_DIR": str(kernel_cache),
        "PYTHONPATH": f"{SUPPORT}:{SUPPORT.parents[1]}",
        "OPENBLAS_NUM_THREADS": "1",  # its threads would not be in the copies
    }


@pytest.fixture(scope="session")
def fake_process(fake_environment):
    """Runs scripts in copies of one such process, which has loaded and launched nothing."""
    server = ForkServer(NAMES, fake_environment)
    yield server
    server.close()


@pytest.fixture
def run(fake_environment, fake_process):
    """run(script) -> what it told, in a process whose CUDA is the fake; with changes to its environment in one that
    starts with them."""

    def run_script(script: str, **changes: str) -> dict:
        if changes:
            command = [sys.executable, "-c", NAMES + script]
            done = subprocess.run(
                command,
                env=fake_environment | changes,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
            )
            status, said = done.returncode, done.stdout
        else:
            status, said = fake_process.run(script)
        assert status == 0, said
        return json.loads(said.split("RESULT")[1].split("\n")[0])

    return run_script
