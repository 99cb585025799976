"""The GPU tier: what it needs, what is left out without it, and the record that a run on a GPU leaves behind.

Tests marked `gpu` need a Hopper GPU. Without one they are skipped and the last lines of the run say how many and why;
with FA3_CUTE_REQUIRE_GPU=1 they fail instead. `--gpu-record FILE` writes what a run showed, and for which sources.
"""

import json
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from machine_lock import machine_lock
from sources import source_hash

TIMING, ERROR = "timing: ", "error: "  # what a test's properties that are measurements start with

# Read when NumPy is first imported, hence no import above that does. One thread: check.py computes heads in parallel,
# and OpenBLAS's threads wait by spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--gpu-record", metavar="FILE", help="write a JSON record of the GPU tests that this run executed")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a Hopper GPU (compute capability 9.0)")
    config.pluginmanager.register(GpuTier(config.getoption("--gpu-record")), "fa3_cute-gpu-tier")


class GpuTier:
    """Skips or fails GPU tests where there is no GPU, counts their outcomes, reports and records them."""

    def __init__(self, record_file: str | None):
        from fa3_cute.arrays.memory import hopper_device_problem

        self.record_file = record_file
        self.problem = hopper_device_problem()
        self.is_required = os.environ.get("FA3_CUTE_REQUIRE_GPU", "0") not in ("", "0")
        self.selected: set[str] = set()
        self.deselected: set[str] = set()
        self.outcomes: dict[str, str] = {}
        self.timings: dict[str, float] = {}
        self.errors: dict[str, tuple[float, float]] = {}

    # With pytest-xdist the workers collect and the controller reports: a worker's sets travel as its output.
    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["gpu_tier"] = sorted(self.selected), sorted(self.deselected)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        selected, deselected = getattr(node, "workeroutput", {}).get("gpu_tier", ((), ()))
        self.selected.update(selected)
        self.deselected.update(deselected)

    def pytest_deselected(self, items):
        self.deselected |= _gpu_node_ids(items)

    def pytest_collection_finish(self, session):
        self.selected = _gpu_node_ids(session.items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if self.problem and item.get_closest_marker("gpu"):
            outcome = pytest.fail if self.is_required else pytest.skip
            outcome(f"needs a Hopper GPU: {self.problem}", **({"pytrace": False} if self.is_required else {}))

    def pytest_runtest_logreport(self, report):
        tells = report.when == "call" or report.outcome != "passed"
        if tells and "gpu" in report.keywords and self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome
        if report.when == "teardown":
            self.timings |= {name: value for name, value in report.user_properties if name.startswith(TIMING)}
            self.errors |= {name: tuple(value) for name, value in report.user_properties if name.startswith(ERROR)}

    def pytest_terminal_summary(self, terminalreporter):
        for name, seconds in self.timings.items():
            terminalreporter.write_line(f"measured: {name.removeprefix(TIMING)}: {seconds:.3f} s")
        for name, (found, others) in self.errors.items():
            terminalreporter.write_line(
                f"measured: {name.removeprefix(ERROR)}: error {found:.2e}, {others:.2e} beside it"
            )
        counts = Counter(self.outcomes.values())
        if self.problem and counts["skipped"]:
            terminalreporter.write_line(f"{counts['skipped']} GPU tests left out: {self.problem}")
        if self.record_file:
            terminalreporter.write_line(self.write_record(counts))

    def write_record(self, counts: Counter) -> str:
        """Write the record file unless no GPU test ran, which must not replace an earlier run's; say what was done."""
        if not counts["passed"] + counts["failed"]:
            return f"{self.record_file} not written: no GPU test ran"
        files = sorted({node_id.partition("::")[0] for node_id in self.selected})
        record = {
            "sha256": source_hash(),
            **_machine(),
            **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
            "selected": len(self.selected),
            "collected": len(self.selected | self.deselected),
            "files": [Path(file).name for file in files],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "timings": {name.removeprefix(TIMING): round(value, 4) for name, value in self.timings.items()},
            "errors": {name.removeprefix(ERROR): self.errors[name] for name in sorted(self.errors)},
        }
        Path(self.record_file).write_text(json.dumps(record, indent=2) + "\n")
        return f"GPU record written to {self.record_file}"


def _gpu_node_ids(items) -> set[str]:
    return {item.nodeid for item in items if item.get_closest_marker("gpu")}


def _machine() -> dict[str, str]:
    """Names and versions of what the tests ran on."""
    import cutlass
    from cuda.core import Device, system

    try:
        driver = "{}.{}.{:02}".format(*system.get_kernel_mode_driver_version())
    except Exception:  # no NVML on this machine: the CUDA version that the driver serves is known all the same
        driver = "CUDA {}.{}".format(*system.get_user_mode_driver_version()[:2])
    flavour = cutlass.CUDA_VERSION
    return {
        "device": Device(0).name,
        "driver": driver,
        "dsl_version": cutlass.__version__,
        "dsl_flavour": f"CUDA {flavour.major}.{flavour.minor}",
    }


@pytest.fixture(scope="session")
def device():
    """The GPU under test, current in the main thread."""
    from fa3_cute.arrays.memory import open_device

    return open_device()


@pytest.fixture(scope="session")
def stream(device):
    """A stream that does not wait for the default stream."""
    return device.create_stream()


@pytest.fixture
def much_memory(device):
    """For tests of more than 8 GB of device memory, which processes side by side must not have at a time.

    They ask for it before they allocate, and free what they have allocated before it ends; the driver gets that back
    here, since cuda.core's pool keeps what is freed.
    """
    from cuda.bindings import driver

    with machine_lock("gpu-memory"):
        yield
        device.sync()
        error, pool = driver.cuDeviceGetMemPool(device.device_id)
        assert error == 0 and driver.cuMemPoolTrimTo(pool, 0)[0] == 0


@pytest.fixture
def timing(record_property):
    """timing(name, seconds): report a measurement at the end of the run and in the record."""
    return lambda name, seconds: record_property(TIMING + name, seconds)


@pytest.fixture
def compare_errors(record_property):
    """compare_errors(name, found, others): report an error and the one that it is held against, in the record too."""
    return lambda name, found, others: record_property(ERROR + name, (found, others))
