"""The command doctor: what it finds, what it prints, which exit status."""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import answer

import fa3_cute
from fa3_cute.arrays import memory as device
from fa3_cute.cli import doctor, main
from fa3_cute.contract.reference import attention_reference
from fa3_cute.contract.status import Status

ROOT = Path(__file__).resolve().parents[2]


class FakeDriver:
    """libcuda with the GPUs that are given: (name, major, minor)."""

    def __init__(self, *gpus, version: int = 13000, init: int = 0):
        self.gpus, self.version, self.init = gpus, version, init

    def cuInit(self, flags):
        return self.init

    def cuDriverGetVersion(self, place):
        return self.write(place, self.version)

    def cuDeviceGetCount(self, place):
        return self.write(place, len(self.gpus))

    def cuDeviceGet(self, place, ordinal):
        return self.write(place, ordinal)

    def cuDeviceGetName(self, buffer, size, device):
        buffer.value = self.gpus[device][0].encode()
        return 0

    def cuDeviceGetAttribute(self, place, number, device):
        _, major, minor = self.gpus[device]
        return self.write(place, {doctor.MAJOR: major, doctor.MINOR: minor, doctor.NUM_SMS: 132}[number])

    @staticmethod
    def write(place, value):
        ctypes.cast(place, ctypes.POINTER(ctypes.c_int))[0] = value
        return 0


H200, A100 = ("NVIDIA H200", 9, 0), ("NVIDIA A100", 8, 0)


def no_driver():
    raise doctor.Wrong("no CUDA driver")


def examined(monkeypatch, driver, *names: str) -> list[doctor.Finding]:
    monkeypatch.setattr(doctor, "load_driver", no_driver if driver is None else lambda: driver)
    return [doctor.finding(name, doctor.CHECKS[name]) for name in names]


@pytest.mark.parametrize(
    "driver, are_right, words",
    [
        (FakeDriver(H200), (True, True), "0: NVIDIA H200, compute capability 9.0, 132 SMs"),
        (FakeDriver(A100, H200), (True, True), "1: NVIDIA H200"),
        (FakeDriver(A100), (True, False), "8.0, 132 SMs: forward needs"),
        (FakeDriver(), (True, False), "none: forward needs"),
        (FakeDriver(H200, version=12080), (False, True), "NVIDIA H200"),
        (FakeDriver(H200, version=12090), (True, True), "NVIDIA H200"),
        (FakeDriver(H200, init=100), (True, False), "cuInit failed with 100"),
        (None, (False, False), "no CUDA driver"),
    ],
)
def test_driver_and_gpus(driver, are_right, words, monkeypatch):
    found = examined(monkeypatch, driver, "driver", "GPUs")
    assert tuple(finding.is_right for finding in found) == are_right
    assert words in found[1].text


def test_self_test_runs_on_the_first_hopper_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "forward_once", lambda ordinal: (f"ran on {ordinal}", {}))
    monkeypatch.setattr(doctor, "compile_once", lambda: ("compiled", {}))
    for driver, text in ((FakeDriver(A100, H200), "ran on 1"), (FakeDriver(A100), "compiled"), (None, "compiled")):
        assert examined(monkeypatch, driver, "self-test")[0].text == text


@pytest.mark.parametrize("factor, is_right", [(1, True), (1.1, False), (np.nan, False)])
def test_self_test_compares_with_the_reference(factor, is_right, monkeypatch):
    """On a GPU that computes the reference, times a factor."""
    memory = []

    def upload(array, stream):
        memory.append(array)
        return len(memory)

    def forward(params, stream):
        q, k, v = (memory[number - 1] for number in (params.q, params.k, params.v))
        memory[params.out - 1] = factor * attention_reference(q, k, v)[0]
        return Status.OK

    gpu = SimpleNamespace(name="NVIDIA H200", create_stream=lambda: None)
    fakes = {
        "open_device": lambda ordinal: gpu,
        "upload": upload,
        "address": lambda buffer: buffer,
        "allocate": lambda nbytes, stream: upload(None, stream),
        "fill": lambda buffer, byte, stream: None,
        "download": lambda buffer, shape, dtype, stream: memory[buffer - 1].astype(dtype),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(device, name, fake)
    monkeypatch.setattr(fa3_cute, "forward", forward)
    found = doctor.finding("self-test", lambda: doctor.forward_once(0))
    assert found.is_right == is_right and ("agrees with" if is_right else "is off by") in found.text, found
    json.dumps(found.facts, allow_nan=False)


@pytest.mark.gpu
def test_self_test_on_the_gpu():
    found = doctor.finding("self-test", lambda: doctor.forward_once(0))
    assert found.is_right and found.facts["error"] < 1e-3, found


def test_everything_right(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"this": lambda: ("is well", {"size": 1})})
    assert answer(capsys, "doctor") == (
        0,
        {"is_right": True, "findings": [{"name": "this", "is_right": True, "text": "is well", "facts": {"size": 1}}]},
    )
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok     this          is well\n\nall is right\n"


def test_whatever_a_check_raises_is_a_finding(monkeypatch, capsys):
    def breaks(error):
        def check():
            raise error

        return check

    monkeypatch.setattr(
        doctor,
        "CHECKS",
        {
            "a": breaks(OSError("libsomething.so: cannot open\nsecond line")),
            "b": breaks(ValueError()),
            "c": breaks(doctor.Wrong("is ill", code=7)),
            "d": lambda: ("is well", {}),
        },
    )
    status, said = answer(capsys, "doctor")
    assert (status, said["is_right"]) == (1, False)
    assert [found["text"] for found in said["findings"]] == [
        "OSError: libsomething.so: cannot open",
        "ValueError: no further word",
        "is ill",
        "is well",
    ]
    assert said["findings"][2]["facts"] == {"code": 7}
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("\n\nwrong: a, b, c\n")


@pytest.mark.parametrize(
    "blocked, wrong",
    [
        ("cutlass", {"CuTe DSL", "launch", "self-test"}),
        ("cuda.bindings", {"cuda-python", "launch", "self-test"}),
        ("cuda", {"cuda-python", "cuda-core", "launch", "self-test"}),
        ("numpy", {"NumPy"}),
        ("ml_dtypes", set()),
    ],
)
def test_a_missing_package_is_a_finding(blocked, wrong, tmp_path):
    """In a process that cannot import it, and without a GPU; the other checks go on."""
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {blocked!r} or name.startswith({blocked + '.'!r}):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from fa3_cute.cli import doctor, main\n"
        "def no_driver(): raise doctor.Wrong('no driver')\n"
        "doctor.load_driver = no_driver\n"
        "sys.exit(main(['doctor', '--json']))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "FA3_CUTE_CACHE_DIR": str(tmp_path)},
    )
    # A C extension that misses NumPy prints a traceback of its own, which is none of this package.
    assert ran.returncode == 1 and "fa3_cute" not in ran.stderr, ran.stderr
    findings = json.loads(ran.stdout)["findings"]
    assert [found["name"] for found in findings] == list(doctor.CHECKS)
    assert {found["name"] for found in findings if not found["is_right"]} >= wrong | {"driver", "GPUs"}
    assert all(found["is_right"] for found in findings if found["name"] in ("Python", "cache"))
    (ml_dtypes,) = (found for found in findings if found["name"] == "ml_dtypes")
    assert ml_dtypes["is_right"] == (blocked != "numpy"), ml_dtypes  # it needs NumPy; itself it is optional


@pytest.mark.parametrize(
    "wants, version, is_right",
    [
        ("==4.8.1", "4.8.1", True),
        ("==4.8.1", "4.9.0", False),
        (">=4.8.0,<4.9", "4.8.0", True),
        (">=4.8.0,<4.9", "4.8.5", True),
        (">=4.8.0,<4.9", "4.7.9", False),
        (">=4.8.0,<4.9", "4.9.0", False),
        (">=4.8.0,<4.9", "4.9", False),
        (">=12.9", "12.8.0", False),
        (">=12.9", "13.0", True),
        (">=1.26", "1.26.4", True),
        (">=0.5", "0.5rc1", True),
        ("", "1", True),
    ],
)
def test_versions_must_suit(wants, version, is_right, monkeypatch):
    monkeypatch.setattr(
        doctor.metadata,
        "requires",
        lambda name: ["numpy>=2", "a-package-2==7", f"a-package{wants}; python_version > '3'"],
    )
    found = doctor.finding("it", lambda: doctor.must_suit("a-package", version, version, {}))
    assert found.is_right == is_right and (is_right or found.text == f"{version}: must be {wants}")


def test_versions_of_a_source_tree(monkeypatch):
    def not_installed(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", not_installed)
    assert doctor.requirement("numpy") == []


def test_the_range_of_the_dsl_is_known():
    """As pip wrote it down, which turns bounds around."""
    assert doctor.requirement("nvidia-cutlass-dsl") == [(">=", "4.8.0"), ("<", "4.9")]


@pytest.mark.parametrize("in_use, also, oldest", [(12, "", (12, 9)), (12, "cu13", (12, 9)), (13, "cu12", (13, 0))])
def test_the_flavour_in_use_is_named(in_use, also, oldest, monkeypatch):
    """By the DSL itself; its major version decides which drivers will do."""
    dsl = SimpleNamespace(__version__="4.8.0", CUDA_VERSION=SimpleNamespace(major=in_use, minor=9))
    monkeypatch.setitem(sys.modules, "cutlass", dsl)
    installed = {f"cu{in_use}": "4.8.0"} | ({also: "4.8.0"} if also else {})
    monkeypatch.setattr(doctor, "installed_flavours", lambda: installed)
    found = doctor.finding("CuTe DSL", doctor.check_dsl)
    words = f" in use, {also} too" if also else ""
    assert found.is_right and found.text == f"4.8.0 for CUDA {in_use}.9 (cu{in_use}{words})"
    assert found.facts["flavour"] == f"cu{in_use}" and found.facts["installed"] == installed
    assert doctor.oldest_cuda() == oldest
    driver = FakeDriver(H200, version=1000 * oldest[0] + 10 * oldest[1] - 10)
    (found,) = examined(monkeypatch, driver, "driver")
    assert not found.is_right and "must be for CUDA {}.{} or newer".format(*oldest) in found.text


def test_installed_flavours_are_found():
    import cutlass

    assert f"cu{cutlass.CUDA_VERSION.major}" in doctor.installed_flavours()


def test_readme_names_the_oldest_drivers():
    """Once for users, and here for machines."""
    said = re.search(
        r"driver for CUDA (\d+)\.(\d+).*?\bcu13.*?(\d+)\.(\d+)", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert {12: tuple(map(int, said.groups()[:2])), 13: tuple(map(int, said.groups()[2:]))} == doctor.OLDEST_CUDA


def test_cache_that_cannot_be_used(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(file / "cache"))
    found = doctor.finding("cache", doctor.check_cache)
    assert not found.is_right and "is not a folder" in found.text and found.facts["is_writable"] is False
