"""One rank a process over NCCL, whose library is called by ctypes: the shared library of any installation will do.

NCCL has no multicast here: NCCL_NVLS_ENABLE=0 is set before the library is loaded unless the environment says other.
"""

import ctypes
import os
import site
import sys
import sysconfig
from functools import cache
from pathlib import Path

from .comm import Move, Sum

UNIQUE_ID_BYTES = 128
UINT8 = 1
TYPES = {"fp16": 6, "bf16": 9}  # ncclDataType_t
ONE_OF_TYPE = {"fp16": {1: 0x3C00, 2: 0x4000}, "bf16": {1: 0x3F80, 2: 0x4000}}  # the bits of the factors that occur
HOST_IMMEDIATE = 1  # ncclScalarResidence_t: a number in the caller's memory, read at the call
SUM = 0  # ncclRedOp_t


class UniqueId(ctypes.Structure):
    """Names a group of ranks: rank 0 makes it, the others are told."""

    _fields_ = [("internal", ctypes.c_byte * UNIQUE_ID_BYTES)]


class NcclError(RuntimeError):
    """A call that NCCL refused, in its words."""


@cache
def library():
    """libnccl.so.2: that of $NCCL_LIBRARY, of the packages nvidia-nccl-cu12 and -cu13, or of the system."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    tried = []
    for candidate in _candidates():
        try:
            found = ctypes.CDLL(candidate)
        except OSError as error:
            tried.append(f"{candidate}: {error}")
            continue
        found.ncclGetErrorString.restype = found.ncclGetLastError.restype = ctypes.c_char_p
        return found
    sentence = "pip install nvidia-nccl-cu12 (or -cu13), or let NCCL_LIBRARY name the file"
    raise NcclError(f"no libnccl.so.2: {sentence}. Tried: {'; '.join(tried)}")


def _candidates():
    if path := os.environ.get("NCCL_LIBRARY"):
        yield path
        return
    folders = dict.fromkeys((sysconfig.get_path("purelib"), *site.getsitepackages(), *sys.path))
    for folder in filter(None, folders):
        path = Path(folder, "nvidia", "nccl", "lib", "libnccl.so.2")
        if path.exists():
            yield str(path)
    yield "libnccl.so.2"


def version() -> int:
    """Of the library: 22703 is 2.27.3."""
    number = ctypes.c_int()
    _call("ncclGetVersion", ctypes.byref(number))
    return number.value


def make_unique_id() -> bytes:
    unique = UniqueId()
    _call("ncclGetUniqueId", ctypes.byref(unique))
    return bytes(unique)


def _call(name: str, *arguments) -> None:
    if failed := getattr(library(), name)(*arguments):
        text = library().ncclGetErrorString(failed).decode()
        last = (library().ncclGetLastError(None) or b"").decode().strip()
        raise NcclError(f"{name}: {text}" + (f" ({last})" if last else ""))


class NcclComm:
    """This process's rank. Collective calls return when they are enqueued on the engine's exchange stream."""

    def __init__(self, engine, rank: int, size: int, unique_id: bytes):
        self.engine, self.size, self.rank, self.ranks = engine, size, rank, (rank,)
        self.handle = ctypes.c_void_p()
        unique = UniqueId.from_buffer_copy(unique_id)
        # The device that is current in this thread is the rank's.
        _call("ncclCommInitRank", ctypes.byref(self.handle), ctypes.c_int(size), unique, ctypes.c_int(rank))

    def move(self, moves: list[Move]) -> None:
        """One group: NCCL runs all of them at once, those between two ranks in this order on both sides."""
        stream = ctypes.c_void_p(int(self.engine.exchange.handle))
        between = [move for move in moves if move.source != move.target]
        for move in moves:
            if move.source == move.target == self.rank:
                self.engine.copy(move.put, move.taken)
        _call("ncclGroupStart")
        for move in between:
            if move.source == self.rank:
                self._transfer("ncclSend", move.taken, move.target, stream)
            elif move.target == self.rank:
                self._transfer("ncclRecv", move.put, move.source, stream)
        _call("ncclGroupEnd")

    def _transfer(self, name: str, tensor, peer: int, stream) -> None:
        count = ctypes.c_size_t(tensor.nbytes)
        _call(name, ctypes.c_void_p(tensor.address), count, UINT8, ctypes.c_int(peer), self.handle, stream)

    def add(self, sums: list[Sum], factor: float, dtype: str) -> None:
        """Each sum to its owner, in the dtype, of the ranks' numbers times the factor, 1 or 2."""
        stream, operation = ctypes.c_void_p(int(self.engine.exchange.handle)), ctypes.c_int(SUM)
        scalar = ctypes.c_uint16(ONE_OF_TYPE[dtype][int(factor)])
        if factor != 1:
            made = ctypes.byref(operation), ctypes.byref(scalar), TYPES[dtype], HOST_IMMEDIATE, self.handle
            _call("ncclRedOpCreatePreMulSum", *made)
        _call("ncclGroupStart")
        for one in sums:
            taken = one.taken[self.rank]
            target = ctypes.c_void_p(one.put.address if one.owner == self.rank else None)
            size = ctypes.c_size_t(taken.nbytes // 2), TYPES[dtype]
            owner = ctypes.c_int(one.owner)
            _call("ncclReduce", ctypes.c_void_p(taken.address), target, *size, operation, owner, self.handle, stream)
        _call("ncclGroupEnd")
        if factor != 1:
            _call("ncclRedOpDestroy", operation, self.handle)

    def close(self) -> None:
        """When the exchanges are done."""
        self.engine.exchange.sync()
        _call("ncclCommDestroy", self.handle)
