"""What a compiled kernel costs, read out of its cubin with the standard library: no CUDA tool, no GPU.

A cubin is a 64-bit ELF file. Per kernel it holds a `.text.<kernel>` section of 16-byte instructions and a
`.nv.info.<kernel>` section of attributes; `.nv.info` holds the attributes that name their kernel by symbol index.
NVIDIA documents neither attributes nor opcodes: the numbers below were found by comparing kernels with what
`cuobjdump -res-usage` and `nvdisasm` say of them, for sm_90.
"""

import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ELF_MAGIC = b"\x7fELF\x02"  # of 64 bits
EM_CUDA = 190  # ELF e_machine
SHT_NOBITS = 8
INSTRUCTION_BYTES = 16
OPCODE_MASK = 0xFFF  # the low 12 bits of an instruction are its opcode and operand form

# Attribute numbers of .nv.info sections.
ATTRIBUTE_FRAME_SIZE = 0x11  # stack bytes per thread: zero exactly when nothing spills and no local array exists
ATTRIBUTE_REQUIRED_THREADS = 0x10
ATTRIBUTE_PARAMETER = 0x17
ATTRIBUTE_REGISTERS = 0x2F  # per thread at launch, before setmaxnreg moves them between warpgroups

# Encodings of an instruction on sm_90: one per form of its operands.
OPCODES = {
    "HGMMA": (0x9F0, 0xDF0),  # wgmma with 16-bit operands: A from registers or shared memory
    "QGMMA": (0x9F3, 0xDF3),  # wgmma with 8-bit floating-point operands
    "USETMAXREG": (0x9C8,),  # setmaxnreg: absent where ptxas ignored it
    "UTMALDG": (0x5B4,),  # TMA load
    "UTMASTG": (0x3B5,),  # TMA store
    "STL": (0x387,),  # store to local memory: a spill, or an array that is indexed at run time
    "LDL": (0x983,),  # load from local memory
    "MUFU": (0x308,),  # special functions: exp2, reciprocal, log2
}


@dataclass(frozen=True)
class CubinKernel:
    """One kernel of a cubin.

    registers    per thread at launch
    stack_bytes  local memory per thread; 0 means no spills
    block        threads (x, y, z) that the kernel requires, or None
    parameters   (offset, bytes) of every kernel parameter, in order
    opcodes      how often each 12-bit opcode occurs in the code
    code         the instructions, 16 bytes each
    """

    name: str
    registers: int
    stack_bytes: int
    block: tuple[int, int, int] | None
    parameters: tuple[tuple[int, int], ...]
    opcodes: Counter
    code: bytes

    def count(self, mnemonic: str) -> int:
        """Instructions of one kind of OPCODES; KeyError for a kind that is not in the table."""
        return sum(self.opcodes[opcode] for opcode in OPCODES[mnemonic])


def cubin_in(code: bytes) -> bytes:
    """From where on an object file of the host has its cubin; b"" if it has none."""
    start = code.find(ELF_MAGIC, len(ELF_MAGIC))
    while start >= 0 and code[start + 18 : start + 20] != struct.pack("<H", EM_CUDA):
        start = code.find(ELF_MAGIC, start + len(ELF_MAGIC))
    return code[start:] if start >= 0 else b""


def read_cubin(data: bytes) -> dict[str, CubinKernel]:
    """The kernels of a cubin by name. Raises ValueError where the bytes are no cubin or a damaged one."""
    try:
        return _read(data)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"damaged cubin of {len(data)} bytes: {error}") from error


def _read(data: bytes) -> dict[str, CubinKernel]:
    sections = _sections(data)
    facts = _shared_attributes(sections)
    kernels = {}
    for section, code in sections.items():
        if section.startswith(".text."):
            name = section.removeprefix(".text.")
            own = _kernel_attributes(sections.get(f".nv.info.{name}", b""))
            kernels[name] = _kernel(name, facts[name] | own, code)
    return kernels


def _kernel(name: str, facts: dict, code: bytes) -> CubinKernel:
    words = struct.iter_unpack("<H14x", code[: len(code) // INSTRUCTION_BYTES * INSTRUCTION_BYTES])
    return CubinKernel(
        name=name,
        registers=facts.get(ATTRIBUTE_REGISTERS, 0),
        stack_bytes=facts.get(ATTRIBUTE_FRAME_SIZE, 0),
        block=facts.get(ATTRIBUTE_REQUIRED_THREADS),
        parameters=tuple(place for _, place in sorted(facts.get(ATTRIBUTE_PARAMETER, {}).items())),
        opcodes=Counter(word & OPCODE_MASK for (word,) in words),
        code=code,
    )


def _shared_attributes(sections: dict[str, bytes]) -> dict[str, dict]:
    """{kernel: attributes} of the section that all kernels share and that names them by symbol index."""
    symbols = _symbol_names(sections)
    facts = defaultdict(dict)
    for attribute, payload in _attributes(sections.get(".nv.info", b"")):
        if attribute in (ATTRIBUTE_REGISTERS, ATTRIBUTE_FRAME_SIZE):
            symbol, value = struct.unpack("<II", payload)
            facts[symbols[symbol]][attribute] = value
    return facts


def _kernel_attributes(content: bytes) -> dict:
    """Attributes of one kernel's own section: its required block and {parameter index: (offset, bytes)}."""
    facts: dict[int, Any] = {ATTRIBUTE_PARAMETER: {}}
    for attribute, payload in _attributes(content):
        if attribute == ATTRIBUTE_PARAMETER:
            _, index, offset, packed = struct.unpack("<IHHI", payload)
            facts[ATTRIBUTE_PARAMETER][index] = (offset, packed >> 18)  # the size sits above 18 bits of flags
        elif attribute == ATTRIBUTE_REQUIRED_THREADS:
            facts[ATTRIBUTE_REQUIRED_THREADS] = struct.unpack("<3I", payload[:12])
    return facts


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, payload) pairs: a format byte says whether the payload has its own length (4) or is two bytes."""
    position = 0
    while position < len(content):
        layout, attribute, inline = struct.unpack_from("<BBH", content, position)
        start = position + 4
        position = start + (inline if layout == 4 else 0)
        yield attribute, content[start:position] if layout == 4 else inline.to_bytes(2, "little")


def _sections(data: bytes) -> dict[str, bytes]:
    """ELF sections by name, bytes only for those that occupy the file."""
    if data[:5] != ELF_MAGIC or struct.unpack_from("<H", data, 18) != (EM_CUDA,):
        raise ValueError("not a cubin: no 64-bit CUDA ELF header")
    (table,) = struct.unpack_from("<Q", data, 40)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ24x", data, table + i * entry_bytes) for i in range(count)]

    def content(header) -> bytes:
        _, kind, _, _, offset, size = header
        if kind == SHT_NOBITS:
            return b""
        if offset + size > len(data):
            raise ValueError(f"damaged cubin: a section ends at byte {offset + size} of {len(data)}")
        return data[offset : offset + size]

    names = content(headers[names_index])
    return {_text(names, header[0]): content(header) for header in headers}


def _symbol_names(sections: dict[str, bytes]) -> list[str]:
    names = sections.get(".strtab", b"")
    return [_text(names, offset) for (offset,) in struct.iter_unpack("<I20x", sections.get(".symtab", b""))]


def _text(table: bytes, start: int) -> str:
    return table[start:].split(b"\0", 1)[0].decode()
