"""ScoreMod and MaskMod on the device: a user's functions, called for every score of a thread.

They are traced into the kernel: what they compute is unrolled over the fragment, and the compiler shares what does not
depend on the column. contract/mods.py says what they take.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Constexpr, Float16, Float32, Int32, Int64, Uint8, const_expr

from ...contract.mods import ELEMENTS, MAX_POINTERS, MAX_SCALARS, SIZES, STRIDES_PER_POINTER, Mod, registered
from ...planning.config import KernelConfig
from .arithmetic import maximum, minimum
from .layout import as_rows_cols, col_offset, unhoisted
from .tiles import Place

POINTED = {"uint8": Uint8, "int32": Int32, "float16": Float16, "bfloat16": BFloat16, "float32": Float32}


@dataclass(frozen=True)
class Info:
    """`info` of a function: lengths of the sequence."""
    n_q: Int32
    n_k: Int32


@dataclass(frozen=True)
class ModArguments:
    """What the mods of a call read: their arrays and scalars one after the other, the ScoreMod's first.

    sizes   of the call, in the order of SIZES
    """
    addresses: tuple[Int64, ...]
    strides: tuple[Int64, ...]
    scalars: tuple[Float32, ...]
    sizes: tuple[Int32, ...]

    @staticmethod
    def create(a) -> "ModArguments":
        """From a kernel's arguments, on the host."""
        return ModArguments(
            tuple(getattr(a, f"mod_pointer_{i}") for i in range(MAX_POINTERS)),
            tuple(getattr(a, f"mod_stride_{i}") for i in range(MAX_POINTERS * STRIDES_PER_POINTER)),
            tuple(getattr(a, f"mod_scalar_{i}") for i in range(MAX_SCALARS)),
            tuple(getattr(a, name) for name in SIZES))

    def start(self, cfg: KernelConfig, num_rows: int) -> "RowMods":
        """Of a thread with so many rows; heads are to be filled in."""
        return RowMods(cfg, self, cute.make_rmem_tensor(num_rows, Int32) if cfg.packs_heads else None)

    def bound(self, cfg: KernelConfig) -> "BoundMods":
        """The mods of a config with what each reads."""
        score_mod = registered(cfg.score_mod) if cfg.score_mod else None
        mask_mod = registered(cfg.mask_mod) if cfg.mask_mod else None
        taken = (len(score_mod.pointers), score_mod.scalars) if score_mod else (0, 0)
        return BoundMods(score_mod, self.aux(score_mod) if score_mod else None,
                         mask_mod, self.aux(mask_mod, *taken) if mask_mod else None)

    def aux(self, mod: Mod, pointers: int = 0, scalars: int = 0) -> "Aux":
        """Of a mod that comes after so many pointers and scalars of the other."""
        strides = self.strides[STRIDES_PER_POINTER * pointers:]
        return Aux(mod, self.addresses[pointers:], strides, self.scalars[scalars:][:mod.scalars], self.sizes)


@dataclass(frozen=True)
class Aux:
    """`aux` of a function."""
    mod: Constexpr[Mod]
    addresses: tuple[Int64, ...]
    strides: tuple[Int64, ...]
    scalars: tuple[Float32, ...]
    sizes: tuple[Int32, ...]

    def load(self, i: int, *index) -> Float32 | Int32:
        """An element of the i-th array; an index beyond the array is taken to its end."""
        element, shape = self.mod.pointers[i]
        if len(index) != len(shape):
            raise ValueError(f"{self.mod.kind} {self.mod.name} gives {len(index)} indices to array {i} of {len(shape)}")
        own = self.strides[STRIDES_PER_POINTER * i:][:len(shape) - 1]
        address, width = self.addresses[i], ELEMENTS[element]
        for at, extent, stride in zip(index, shape, (*own, 1), strict=True):
            end = self.sizes[SIZES.index(extent)] if isinstance(extent, str) else extent
            place = maximum(minimum(Int32(at), Int32(end - 1)), Int32(0))
            address = address + Int64(place) * (stride * width)
        ptr = cute.make_ptr(POINTED[element], address, cute.AddressSpace.gmem, assumed_align=width)
        value = cute.make_tensor(ptr, cute.make_layout(1))[0]
        return value.to(Int32 if element in ("uint8", "int32") else Float32)


@dataclass(frozen=True)
class BoundMods:
    """The mods of a config, None where there is none, with their `aux`."""
    score_mod: Constexpr[Optional[Mod]]
    score_aux: Optional[Aux]
    mask_mod: Constexpr[Optional[Mod]]
    mask_aux: Optional[Aux]

    def scored(self, score: Float32, *place) -> Float32:
        """What the ScoreMod makes of a score."""
        return Float32(self.score_mod.fn(score, *place, self.score_aux))

    def masked(self, score: Float32, *place) -> Float32:
        """The score, or -inf where the MaskMod says that it does not count."""
        return cutlass.select_(Boolean(self.mask_mod.fn(*place, self.mask_aux)), score, Float32(-Float32.inf))


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
        mods, info = self.arguments.bound(self.cfg), Info(tile.seqlen_q, tile.seqlen_k)
        # One function after the other and column by column: what is read of a key is read for both rows, and not kept.
        if const_expr(self.cfg.score_mod):
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                for r in cutlass.range_constexpr(len(queries)):
                    S[r, c] = mods.scored(S[r, c], batch, heads[r], queries[r], first_key + col_offset(c), info)
        if const_expr(self.cfg.mask_mod != "" and is_masked):
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                for r in cutlass.range_constexpr(len(queries)):
                    S[r, c] = mods.masked(S[r, c], batch, heads[r], queries[r], first_key + col_offset(c), info)
