"""The decode kernel's scratch memory: calls that need it, and that of the caller between guard bands."""

import numpy as np
from cases import DECODE, Case
from images import GUARD_BYTES, POISON

from fa3_cute.arrays import memory as cuda

SOME = DECODE[::2]  # every head_dim, both dtypes
SEVERAL_CLUSTERS = 24  # splits: 3 clusters of 8

# Shapes and splits of like and unlike kernels: items, clusters and rows of a tile all differ.
ALTERNATING = [
    (Case("bf16", 128, False, 16, 2, 1, 2000, batch=2), 128),
    (Case("bf16", 128, False, 4, 4, 1, 300, batch=5), 34),
    (Case("bf16", 128, False, 64, 1, 2, 500), SEVERAL_CLUSTERS),
    (Case("bf16", 128, True, 6, 2, 3, 1000, batch=3), 255),
    (Case("fp16", 256, False, 16, 2, 1, 700, batch=4), 48),
    (Case("bf16", 128, False, 16, 2, 1, 2000, batch=2), 0),
    (Case("fp16", 64, False, 8, 8, 1, 4000, batch=1), 251),
]


class Workspace:
    """Scratch memory of so many bytes, aligned to 16 and no more, full of NaN, between guard bands."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self.buffer = cuda.allocate(GUARD_BYTES + nbytes + GUARD_BYTES)
        self.start = GUARD_BYTES - 16
        cuda.fill(self.buffer, POISON)

    @property
    def fields(self) -> dict:
        return {"workspace": cuda.address(self.buffer, self.start), "workspace_bytes": self.nbytes}

    def parts(self, stream) -> tuple[np.ndarray, np.ndarray]:
        """(the bytes around it, its own) after the work on `stream`."""
        whole = cuda.download(self.buffer, (self.buffer.size,), np.uint8, stream=stream)
        end = self.start + self.nbytes
        return np.concatenate([whole[: self.start], whole[end:]]), whole[self.start : end]
