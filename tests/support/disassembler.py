"""NVIDIA's disassembler, which the cubin reader and `inspect` are held against."""

import importlib.util
from pathlib import Path


def nvdisasm() -> Path | None:
    """The program, or None where neither wheel that has it is installed."""
    for package in ("nvidia.cu13", "nvidia.cu12"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in spec.submodule_search_locations if spec else ():
            if (tool := Path(folder, "bin", "nvdisasm")).exists():
                return tool
    return None
