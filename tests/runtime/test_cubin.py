"""The cubin reader: a hand-made cubin, damaged ones, and a real one against NVIDIA's disassembler."""

import re
import struct
import subprocess

import pytest
from disassembler import nvdisasm

from fa3_cute.runtime import cubin

HGMMA, STL, EXIT = 0x9F0, 0x387, 0x94D


def instruction(opcode: int, flags: int = 0xA) -> bytes:
    return struct.pack("<H14x", flags << 12 | opcode)


def attribute(number: int, payload: bytes) -> bytes:
    return struct.pack("<BBH", 4, number, len(payload)) + payload


def make_cubin(sections: dict[str, bytes], machine: int = cubin.EM_CUDA) -> bytes:
    """A minimal ELF file: header, contents, section headers. `.nv.shared.*` takes no bytes in the file."""
    sections = {"": b"", **sections, ".shstrtab": b""}
    names = "\0".join(sections).encode() + b"\0"
    sections[".shstrtab"] = names
    body, headers = b"", b""
    for name, content in sections.items():
        kind = cubin.SHT_NOBITS if name.startswith(".nv.shared.") else 1
        start = names.index(name.encode() + b"\0") if name else 0
        headers += struct.pack("<IIQQQQIIQQ", start, kind, 0, 0, 64 + len(body), len(content), 0, 0, 0, 0)
        body += b"" if kind == cubin.SHT_NOBITS else content
    header = struct.pack(
        "<5s11xHHIQQQIHHHHHH",
        b"\x7fELF\x02",
        2,
        machine,
        1,
        0,
        0,
        64 + len(body),
        0,
        64,
        0,
        0,
        64,
        len(sections),
        len(sections) - 1,
    )
    return header + body + headers


def kernel_sections(name: str = "fwd") -> dict[str, bytes]:
    symbols = struct.pack("<I20x", 0) + struct.pack("<I20x", 1)
    return {
        ".strtab": b"\0" + name.encode() + b"\0",
        ".symtab": symbols,
        ".nv.info": attribute(0x2F, struct.pack("<II", 1, 168)) + attribute(0x11, struct.pack("<II", 1, 48)),
        f".nv.info.{name}": (
            struct.pack("<BBH", 3, 0x1B, 255)  # an inline attribute
            + attribute(0x17, struct.pack("<IHHI", 0, 1, 128, 8 << 18 | 3))  # parameters, last first
            + attribute(0x17, struct.pack("<IHHI", 0, 0, 0, 128 << 18))
            + attribute(0x10, struct.pack("<3I", 384, 1, 1))
        ),
        f".text.{name}": instruction(HGMMA) + instruction(0xDF0, 3) + instruction(STL) + instruction(EXIT),
        f".nv.shared.{name}": bytes(1024),
    }


def test_reads_a_kernel():
    kernel = cubin.read_cubin(make_cubin(kernel_sections()))["fwd"]
    assert (kernel.name, kernel.registers, kernel.stack_bytes, kernel.block) == ("fwd", 168, 48, (384, 1, 1))
    assert kernel.parameters == ((0, 128), (128, 8))
    assert kernel.count("HGMMA") == 2 and kernel.count("STL") == 1 and kernel.count("LDL") == 0
    assert kernel.opcodes.total() == 4


def test_unknown_mnemonic_is_a_key_error():
    with pytest.raises(KeyError):
        cubin.read_cubin(make_cubin(kernel_sections()))["fwd"].count("HGEMM")


def test_no_kernel():
    assert cubin.read_cubin(make_cubin({})) == {}


@pytest.mark.parametrize(
    "data",
    [b"", b"\x7fELF", bytes(64), make_cubin(kernel_sections(), machine=62)],
    ids=["empty", "magic only", "zeros", "x86"],
)
def test_not_a_cubin(data):
    with pytest.raises(ValueError, match="cubin"):
        cubin.read_cubin(data)


def test_truncated_anywhere_is_a_value_error():
    data = make_cubin(kernel_sections())
    for length in range(len(data)):
        with pytest.raises(ValueError, match="cubin"):
            cubin.read_cubin(data[:length])


@pytest.mark.skipif(nvdisasm() is None, reason="needs the nvidia-cuda-nvdisasm wheel")
def test_counts_agree_with_nvdisasm(tmp_path):
    from fa3_cute.planning import tables
    from fa3_cute.runtime import compiler

    cfg = tables.forward_config("bf16", 64, "causal", True, False)
    compiled = compiler._compile(cfg, f"--keep-cubin --dump-dir {tmp_path}")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.__cubin__)
    listing = subprocess.run([nvdisasm(), "-c", path], capture_output=True, text=True, check=True).stdout
    (kernel,) = cubin.read_cubin(compiled.__cubin__).values()
    for mnemonic in cubin.OPCODES:
        listed = len(re.findall(rf"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?{mnemonic}\b", listing, re.MULTILINE))
        assert kernel.count(mnemonic) == listed, mnemonic
