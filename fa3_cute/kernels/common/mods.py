"""ScoreMod and MaskMod on the device: a user's functions, called for every score of a thread.

They are traced into the kernel: what they compute is unrolled over the fragment, and the compiler shares what does not
depend on the column. contract/mods.py says what they take.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Constexpr, Float16, Float32, Int32, Int64, Uint8, const_expr

from ...contract.mods import ELEMENTS, STRIDES_PER_POINTER, Mod, registered
from ...planning.config import KernelConfig
from .arithmetic import maximum, minimum
from .layout import as_rows_cols, col_offset, unhoisted
from .tiles import Place

GROUP = 16                # columns of a thread for which a function reads arrays at a time; see `after`
MAX_DIMS = STRIDES_PER_POINTER + 1
POINTED = {"uint8": Uint8, "int32": Int32, "float16": Float16, "bfloat16": BFloat16, "float32": Float32}


@dataclass(frozen=True)
class Info:
    """`info` of a function: lengths of the sequence."""
    n_q: Int32
    n_k: Int32


@dataclass(frozen=True)
class ModArguments:
    """What the mods of a call read: arrays and scalars one after the other, the ScoreMod's first.

    strides   in bytes, of all dimensions but the last, STRIDES_PER_POINTER of each array
    last      index in each dimension, MAX_DIMS of each array
    """
    addresses: tuple[Int64, ...]
    strides: tuple[Int64, ...]
    last: tuple[Int32, ...]
    scalars: tuple[Float32, ...]

    @staticmethod
    def create(cfg: KernelConfig, a) -> "ModArguments":
        """From a kernel's arguments, on the host: the main loop takes these as they are, from constant memory."""
        arrays = [array for mod in mods_of(cfg) for array in mod.pointers]
        given = [getattr(a, f"mod_stride_{i}") for i in range(STRIDES_PER_POINTER * len(arrays))]
        extents = [extent for array in arrays for extent in (*array.shape, *[1] * (MAX_DIMS - len(array.shape)))]
        return ModArguments(
            tuple(getattr(a, f"mod_pointer_{i}") for i in range(len(arrays))),
            tuple(stride * ELEMENTS[arrays[i // STRIDES_PER_POINTER].element] for i, stride in enumerate(given)),
            tuple(Int32(getattr(a, extent) if isinstance(extent, str) else extent) - 1 for extent in extents),
            tuple(getattr(a, f"mod_scalar_{i}") for i in range(sum(mod.scalars for mod in mods_of(cfg)))))

    def start(self, cfg: KernelConfig, num_rows: int) -> "RowMods":
        """Of a thread with so many rows; heads are to be filled in."""
        return RowMods(cfg, self, cute.make_rmem_tensor(num_rows, Int32) if cfg.packs_heads else None)

    def aux(self, mod: Mod, pointers: int = 0, scalars: int = 0) -> "Aux":
        """Of a mod that comes after so many pointers and scalars of the other."""
        return Aux(mod, self.addresses[pointers:], self.strides[STRIDES_PER_POINTER * pointers:],
                   self.last[MAX_DIMS * pointers:], self.scalars[scalars:][:mod.scalars])


def mods_of(cfg: KernelConfig) -> list[Mod]:
    """The mods of a config, in the order in which they take what is given."""
    return [registered(name) for name in (cfg.score_mod, cfg.mask_mod) if name]


@dataclass(frozen=True)
class Aux:
    """`aux` of a function."""
    mod: Constexpr[Mod]
    addresses: tuple[Int64, ...]
    strides: tuple[Int64, ...]
    last: tuple[Int32, ...]
    scalars: tuple[Float32, ...]

    def load(self, i: int, *index) -> Float32 | Int32:
        """An element of the i-th array; an index beyond the array is taken to its end."""
        element, shape = self.mod.pointers[i]
        if len(index) != len(shape):
            raise ValueError(f"{self.mod.kind} {self.mod.name} gives {len(index)} indices to array {i} of {len(shape)}")
        strides = (*self.strides[STRIDES_PER_POINTER * i:][:len(shape) - 1], ELEMENTS[element])
        address = self.addresses[i]
        for at, last, stride in zip(index, self.last[MAX_DIMS * i:], strides):
            address = address + Int64(maximum(minimum(Int32(at), last), Int32(0))) * stride
        ptr = cute.make_ptr(POINTED[element], address, cute.AddressSpace.gmem, assumed_align=ELEMENTS[element])
        value = cute.make_tensor(ptr, cute.make_layout(1))[0]
        return value.to(Int32 if element in ("uint8", "int32") else Float32)


@dataclass(frozen=True)
class RowMods:
    """The mods of a thread's rows. heads: of each row; None where all are the tile's."""
    cfg: Constexpr
    arguments: ModArguments
    heads: Optional[cute.Tensor]

    @cute.jit
    def apply(self, acc_S: cute.Tensor, place: Place, is_masked: Constexpr[bool]):
        """Scores of one K/V tile, in place; is_masked: the MaskMod has something to hide there."""
        S, tile, to_query = as_rows_cols(acc_S), place.tile, place.tile.seqlen_q - place.tile.seqlen_k
        # Through shuffles: what follows from these stays where it is, while the compiler would keep the addresses of
        # arrays over the loop over tiles, in registers that the main loop needs.
        first_key, batch = unhoisted(place.first_key), unhoisted(tile.sequence)
        queries = [unhoisted(diagonal + to_query) for diagonal in place.diagonals]
        heads = [unhoisted(tile.head)] * len(queries)
        if const_expr(self.cfg.packs_heads):
            heads = [unhoisted(self.heads[r]) for r in range(len(queries))]
        info, taken, num_cols = Info(tile.seqlen_q, tile.seqlen_k), (0, 0), cute.size(S, mode=[1])
        # One function after the other and column by column: what is read of a key is read for both rows, and not kept.
        if const_expr(self.cfg.score_mod):
            mod = registered(self.cfg.score_mod)
            aux, taken = self.arguments.aux(mod), (len(mod.pointers), mod.scalars)
            for c in cutlass.range_constexpr(num_cols):
                for r in cutlass.range_constexpr(len(queries)):
                    key = first_key + col_offset(c)
                    S[r, c] = Float32(mod.fn(S[r, c], batch, heads[r], queries[r], key, info, aux))
                if const_expr(len(mod.pointers) > 0 and (c % GROUP == GROUP - 1 or c == num_cols - 1)):
                    first_key = after(first_key, S[1, c])
        if const_expr(self.cfg.mask_mod != "" and is_masked):
            mod = registered(self.cfg.mask_mod)
            aux = self.arguments.aux(mod, *taken)
            for c in cutlass.range_constexpr(num_cols):
                for r in cutlass.range_constexpr(len(queries)):
                    counts = Boolean(mod.fn(batch, heads[r], queries[r], first_key + col_offset(c), info, aux))
                    S[r, c] = cutlass.select_(counts, S[r, c], Float32(-Float32.inf))


def after(value: Int32, score: Float32) -> Int32:
    """The value, once a score is known: what is read by it is not read earlier, into registers that are in use.

    By a shuffle from the lane itself, whose number's upper bits, which do not count, are the score's.
    """
    return cute.arch.shuffle_sync(value, score.bitcast(Int32) & -32 | cute.arch.lane_idx())
