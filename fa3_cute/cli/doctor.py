"""Checks what this installation needs, one line per finding, and ends with a self-test: one small forward on the first
Hopper GPU, compared with the reference; without one, a compile of the same kernel for sm_90a.

Every check is made even if others fail, and whatever is missing or broken is a finding. Exit status 0 if all is right,
1 if something is wrong. A machine without a Hopper GPU is one where `forward` cannot run, hence also 1, although
everything else (compile, inspect, explain, attention() of NumPy arrays) works there; the findings of driver and GPUs
say so. Without the optional package ml_dtypes nothing is wrong.
"""

import ctypes
import json
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path

from ..runtime import disk_cache
from ..planning.tables import forward_config

# The self-test: one tile of Q, one of K and V, no mask; FP16, so that it needs no package for BF16.
TOKENS, HEAD_DIM = 128, 128
WRONG = 1e-2  # relative error (norm); rounding to FP16 leaves about 3e-4

OLDEST_PYTHON = (3, 11)
# What a driver must be for, by the CUDA of the DSL's flavour: for 12.9 NVIDIA names 575.51.03; for 13.x 580 will do,
# since drivers of a major version load what a later minor one has assembled.
OLDEST_CUDA = {12: (12, 9), 13: (13, 0)}
FLAVOURS = {f"cu{major}": f"nvidia-cutlass-dsl-libs-cu{major}" for major in OLDEST_CUDA}
HOPPER = (9, 0)
# CUdevice_attribute
MAJOR, MINOR, NUM_SMS = 75, 76, 16
DRIVER_VERSION_FILE = Path("/sys/module/nvidia/version")
WITHOUT_GPU = "forward cannot run here; compiling needs no GPU"
# Of version specifiers; those of two letters first, as they are read.
HOLDS = {"==": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Wrong(Exception):
    """What a check found, in a sentence, with the facts as keywords."""

    def __init__(self, text: str, **facts):
        super().__init__(text)
        self.facts = facts


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `facts` are plain values."""

    name: str
    is_right: bool
    text: str
    facts: dict = field(default_factory=dict)


def add_arguments(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args) -> int:
    findings = []
    for name, check in CHECKS.items():
        found = finding(name, check)
        findings.append(found)
        if not args.json:
            print(f"{'ok' if found.is_right else 'WRONG':5}  {name:12}  {found.text}", flush=True)
    wrong = [found.name for found in findings if not found.is_right]
    if args.json:
        print(json.dumps({"is_right": not wrong, "findings": list(map(asdict, findings))}, indent=1))
    else:
        print(f"\nwrong: {', '.join(wrong)}" if wrong else "\nall is right")
    return 1 if wrong else 0


def finding(name: str, check: Callable) -> Finding:
    """The check's (text, facts) as a finding; so is whatever it raises."""
    try:
        text, facts = check()
        return Finding(name, True, text, facts)
    except Wrong as wrong:
        return Finding(name, False, str(wrong), wrong.facts)
    except Exception as error:  # a broken package raises anything, and that is the finding
        said = str(error).strip().splitlines()
        return Finding(name, False, f"{type(error).__name__}: {said[0] if said else 'no further word'}")


# ---- Python and its packages -----------------------------------------------------------------------------------------


def check_python():
    version = sys.version.split()[0]
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise Wrong("{}: must be {}.{} or newer".format(version, *OLDEST_PYTHON), version=version)
    return version, {"version": version}


def check_dsl():
    cutlass = import_module("cutlass")
    cuda = cutlass.CUDA_VERSION
    facts = {
        "version": cutlass.__version__,
        "flavour": f"cu{cuda.major}",
        "cuda": f"{cuda.major}.{cuda.minor}",
        "installed": installed_flavours(),
    }
    unused = [flavour for flavour in facts["installed"] if flavour != facts["flavour"]]
    text = "{version} for CUDA {cuda} ({flavour}".format_map(facts) + f" in use, {', '.join(unused)} too" * bool(unused)
    return must_suit("nvidia-cutlass-dsl", cutlass.__version__, f"{text})", facts)


def installed_flavours() -> dict[str, str]:
    """Version by flavour of the DSL's libraries; which of several the DSL takes is its own choice."""
    found = {}
    for flavour, distribution in FLAVOURS.items():
        try:
            found[flavour] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_package(distribution: str, module: str):
    """Of a package: its module can be imported, and its version is one that this package wants."""
    import_module(module)
    version = metadata.version(distribution)
    return must_suit(distribution, version, version, {"version": version})


def check_ml_dtypes():
    try:
        return check_package("ml_dtypes", "ml_dtypes")
    except ModuleNotFoundError as error:
        if error.name != "ml_dtypes":  # it is there, what it needs is not
            raise
        return "not installed; optional, for NumPy arrays of BF16 and FP8", {"version": None}


def must_suit(distribution: str, version: str, text: str, facts: dict):
    """(text, facts), or Wrong if the installed package's requirements ask for another version."""
    wanted = requirement(distribution)
    if not all(HOLDS[sign](numbers(version), numbers(bound)) for sign, bound in wanted):
        raise Wrong(f"{text}: must be {','.join(map(''.join, wanted))}", **facts)
    return text, facts


def requirement(distribution: str) -> list[tuple[str, str]]:
    """(operator, version) of each bound on a package that this one needs, the lowest first; [] if it names none, or
    is not installed itself."""
    try:
        lines = metadata.requires("fa3_cute") or []
    except metadata.PackageNotFoundError:
        return []
    found = (re.match(rf"{re.escape(distribution)}(?![\w.-])(?:\[[^]]*\])?\s*\(?([^;)]*)", line) for line in lines)
    bounds = next((match[1] for match in found if match), "")
    return sorted(re.findall(rf"({'|'.join(HOLDS)})\s*([\d.]+)", bounds), key=lambda bound: numbers(bound[1]))


def numbers(version: str) -> tuple[int, ...]:
    """ "13.4.4" as (13, 4, 4), and "13.0" as (13,); what follows the numbers is left out."""
    found = tuple(map(int, re.findall(r"\d+", version[: len(version) - len(version.lstrip("0123456789."))])))
    while found[-1:] == (0,):
        found = found[:-1]
    return found


# ---- driver and GPUs -------------------------------------------------------------------------------------------------


def load_driver():
    """The CUDA driver's library; Wrong where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Wrong(f"no CUDA driver on this machine: {WITHOUT_GPU}", error=str(error)) from error


def asked(function, *arguments) -> int:
    """The int that a driver function writes through its first argument; Wrong if it fails."""
    value = ctypes.c_int()
    call(function, ctypes.byref(value), *arguments)
    return value.value


def call(function, *arguments) -> None:
    if code := function(*arguments):
        raise Wrong(f"{function.__name__} failed with {code}: {WITHOUT_GPU}", code=code)


def check_driver():
    version = asked(load_driver().cuDriverGetVersion)
    cuda = (version // 1000, version % 1000 // 10)
    facts = {"cuda": "{}.{}".format(*cuda), "version": kernel_driver_version()}
    text = f"{facts['version'] or 'of unknown version'}, for CUDA {facts['cuda']}"
    oldest = oldest_cuda()
    if cuda < oldest:
        raise Wrong("{}: must be for CUDA {}.{} or newer".format(text, *oldest), **facts)
    return text, facts


def oldest_cuda() -> tuple[int, int]:
    """What a driver must be for, by the DSL's flavour in use; the least of all where there is no DSL to ask."""
    try:
        return OLDEST_CUDA[import_module("cutlass").CUDA_VERSION.major]
    except Exception:  # the DSL's own finding
        return min(OLDEST_CUDA.values())


def kernel_driver_version() -> str | None:
    try:
        return DRIVER_VERSION_FILE.read_text().strip()
    except OSError:
        return None


def find_gpus() -> list[dict]:
    """Name, compute capability and SMs of every GPU that this process sees; Wrong where the driver cannot say."""
    driver = load_driver()
    call(driver.cuInit, 0)
    gpus = []
    for ordinal in range(asked(driver.cuDeviceGetCount)):
        device, name = asked(driver.cuDeviceGet, ordinal), ctypes.create_string_buffer(256)
        call(driver.cuDeviceGetName, name, len(name), device)
        major, minor, sms = (asked(driver.cuDeviceGetAttribute, number, device) for number in (MAJOR, MINOR, NUM_SMS))
        gpus.append({"name": name.value.decode(), "capability": [major, minor], "sms": sms})
    return gpus


def first_hopper(gpus: list[dict]) -> int | None:
    """The first GPU that can run the kernels."""
    return next((number for number, gpu in enumerate(gpus) if tuple(gpu["capability"]) == HOPPER), None)


def check_gpus():
    gpus = find_gpus()
    sentence = "{}: {name}, compute capability {capability[0]}.{capability[1]}, {sms} SMs"
    text = "; ".join(sentence.format(number, **gpu) for number, gpu in enumerate(gpus)) or "none"
    if first_hopper(gpus) is None:
        raise Wrong(f"{text}: forward needs compute capability 9.0 (Hopper: H100, H200); {WITHOUT_GPU}", gpus=gpus)
    return text, {"gpus": gpus}


# ---- cache, launch, self-test ----------------------------------------------------------------------------------------


def check_cache():
    folder = disk_cache.cache_dir()
    problem = disk_cache.folder_problem()
    facts = {"path": folder and str(folder), "is_writable": problem is None}
    if problem:
        raise Wrong(f"{problem}; kernels would be compiled in every process", **facts)
    found = disk_cache.entries()
    facts |= {"entries": len(found), "bytes": sum(entry.nbytes for entry in found)}
    return f"{folder}: writable, {facts['entries']} files, {facts['bytes']} bytes", facts


def tested_config():
    """The config that the self-test runs or compiles."""
    return forward_config("fp16", HEAD_DIM, "full", has_lse=False, is_varlen=False)


def check_launch():
    names = import_module("..runtime.launch", __package__).PRIVATE_NAMES
    compiled = import_module("..runtime.compiler", __package__).get_kernel(tested_config())
    missing = [name for name in names if not hasattr(compiled, name)]
    if missing:
        raise Wrong(f"this nvidia-cutlass-dsl has no {', '.join(missing)}: no kernel can be launched", missing=missing)
    return "through a packed argument buffer", {"missing": missing}


def self_test():
    try:
        ordinal = first_hopper(find_gpus())
    except Wrong:  # the GPUs' own finding
        ordinal = None
    return compile_once() if ordinal is None else forward_once(ordinal)


def compile_once():
    report = import_module("..runtime.compiler", __package__).compile_report(tested_config())
    facts = {"kernel": report.name, "seconds": report.seconds}
    if problems := report.problems():
        raise Wrong(f"{report.name}: {'; '.join(problems)}", **facts)
    return f"compiled {report.name} for sm_90a in {report.seconds:.1f} s; no Hopper GPU to run it on", facts


def forward_once(ordinal: int):
    import numpy as np

    from .. import DataType, FlashAttentionParams, forward
    from ..arrays.memory import address, allocate, download, fill, open_device, upload
    from ..contract.reference import attention_reference

    device = open_device(ordinal)
    stream = device.create_stream()
    arrays = np.random.default_rng(0).standard_normal((3, 1, TOKENS, 1, HEAD_DIM), np.float32).astype(np.float16)
    buffers = {name: upload(array, stream=stream) for name, array in zip("qkv", arrays, strict=True)}
    buffers["out"] = allocate(arrays[0].nbytes, stream=stream)
    fill(buffers["out"], 0xFF, stream=stream)  # NaN: what the kernel leaves out shows
    q, k, v, out_at = (address(buffers[name]) for name in ("q", "k", "v", "out"))
    forward(
        FlashAttentionParams(
            q=q,
            k=k,
            v=v,
            out=out_at,
            batch_size=1,
            seqlen_q=TOKENS,
            seqlen_k=TOKENS,
            num_heads=1,
            num_heads_k=1,
            head_dim=HEAD_DIM,
            dtype=DataType.FP16,
        ),
        stream,
    ).check()
    out = download(buffers["out"], arrays[0].shape, np.float16, stream=stream)
    exact, _ = attention_reference(*arrays)
    error = float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
    facts = {"kernel": tested_config().name, "gpu": device.name, "error": error if error == error else None}
    if not error < WRONG:
        raise Wrong(f"{tested_config().name} on {device.name} is off by {error:.1e}", **facts)
    return f"{tested_config().name} on {device.name} agrees with the reference, relative error {error:.1e}", facts


CHECKS = {
    "Python": check_python,
    "driver": check_driver,
    "GPUs": check_gpus,
    "CuTe DSL": check_dsl,
    "cuda-python": lambda: check_package("cuda-python", "cuda.bindings.driver"),
    "cuda-core": lambda: check_package("cuda-core", "cuda.core"),
    "NumPy": lambda: check_package("numpy", "numpy"),
    "ml_dtypes": check_ml_dtypes,
    "cache": check_cache,
    "launch": check_launch,
    "self-test": self_test,
}
