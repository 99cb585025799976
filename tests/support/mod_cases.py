"""Mods that tests compile and run, as device code and as NumPy; and a Problem that has some."""

import math
import zlib
from dataclasses import dataclass, field, fields
from typing import Any

import cutlass
import cutlass.cute as cute
import numpy as np
from check import Problem, make_problem, params_of
from cutlass import Float32, Int32
from images import Tensor, contiguous

from fa3_cute import MaskMod, ScoreMod
from fa3_cute.contract.reference import as_float, to_bits

LOG2_E = math.log2(math.e)
NUM_BUCKETS, NUM_EXACT, MOST_DISTANCE = 32, 16, 128
TABLE = 96


@cute.jit
def capped(score, batch, head, query, key, info, aux):
    """softcap, of scalars[0]."""
    x = cutlass.min(cutlass.max(score / aux.scalars[0], -20.0), 20.0)
    power = cute.math.exp2(x * (2.0 * LOG2_E), fastmath=True)
    return aux.scalars[0] * (1.0 - 2.0 * cute.arch.rcp_approx(1.0 + power))


def capped_on_host(score, batch, head, query, key, info, aux):
    """The same in NumPy."""
    cap = score.dtype.type(aux.scalars[0])
    return cap * np.tanh(score / cap)


@cute.jit
def t5_biased(score, batch, head, query, key, info, aux):
    """A bias by head and by distance, of logarithmic buckets beyond NUM_EXACT."""
    distance = cutlass.max(query + info.n_k - info.n_q - key, 0)
    bucket = distance
    if distance >= NUM_EXACT:
        steps = cute.math.log2(Float32(distance) * (1.0 / NUM_EXACT), fastmath=True)
        bucket = NUM_EXACT + Int32(steps * (NUM_EXACT / math.log2(MOST_DISTANCE / NUM_EXACT)) + 1e-4)
    return score + aux.load(0, head, cutlass.min(bucket, NUM_BUCKETS - 1))


def t5_biased_on_host(score, batch, head, query, key, info, aux):
    """The same in NumPy."""
    distance = np.maximum(query + info.n_k - info.n_q - key, 0)
    steps = np.log2(np.maximum(distance, 1).astype(np.float32) / NUM_EXACT)
    far = NUM_EXACT + (steps * (NUM_EXACT / math.log2(MOST_DISTANCE / NUM_EXACT)) + 1e-4).astype(np.int32)
    bucket = np.where(distance >= NUM_EXACT, far, distance)
    return score + aux.load(0, head, np.minimum(bucket, NUM_BUCKETS - 1))


def by_distance(score, batch, head, query, key, info, aux):
    """A bias by sequence and distance, in a table whose ends stand for all beyond: the same on the device and here."""
    return score * 0.5 + aux.load(0, batch, query + info.n_k - info.n_q - key + TABLE // 2) * aux.scalars[0]


def same_document(batch, head, query, key, info, aux):
    """Queries see keys of their own document: numbers by key."""
    return aux.load(0, batch, query + info.n_k - info.n_q) == aux.load(0, batch, key)


def odd_heads_see_even_keys(batch, head, query, key, info, aux):
    """A mask by head, in arithmetic alone; hides every key from queries 40 .. 49."""
    return ((key + head) % 2 == 0) & ((query < 40) | (query >= 50))


@dataclass(frozen=True)
class ModCase:
    """A mod and what it reads: {how an array is made}, by element type and shape, and scalars."""

    mod: ScoreMod | MaskMod
    fill: Any = None
    scalars: tuple[float, ...] = ()


def documents(shape: tuple[int, ...], rng) -> np.ndarray:
    """Numbers that rise along the last dimension, about one in 60 a new one."""
    return np.cumsum(rng.random(shape) < 1 / 60, axis=-1)


def normal(shape: tuple[int, ...], rng) -> np.ndarray:
    """Numbers of a bias."""
    return rng.standard_normal(shape)


CAPPED = ModCase(ScoreMod(capped, name="capped", scalars=1, numpy=capped_on_host), scalars=(1.5,))
T5 = ModCase(
    ScoreMod(t5_biased, name="t5", pointers=[("float32", ("num_heads", NUM_BUCKETS))], numpy=t5_biased_on_host), normal
)
BY_DISTANCE = ModCase(
    ScoreMod(by_distance, name="by_distance", pointers=[("bfloat16", ("batch_size", TABLE))], scalars=1),
    normal,
    (-0.75,),
)
DOCUMENTS = ModCase(
    MaskMod(same_document, name="documents", pointers=[("int32", ("batch_size", "seqlen_k"))]), documents
)
EVEN_KEYS = ModCase(MaskMod(odd_heads_see_even_keys, name="even_keys"))


@dataclass(frozen=True)
class ModProblem(Problem):
    """A problem with mods: the arrays that they read, the ScoreMod's first."""

    mods: tuple[ModCase, ...] = ()
    arrays: tuple[Tensor, ...] = field(default_factory=tuple)

    @property
    def options(self) -> dict:
        return super().options | self.twins

    def options_of(self, heads: slice, kv_heads: slice) -> dict:
        return super().options_of(heads, kv_heads) | self.twins | {"first_head": heads.start or 0}

    @property
    def twins(self) -> dict:
        """The mods on the host."""
        found, first = {}, 0
        for case in self.mods:
            own = self.arrays[first : first + len(case.mod.pointers)]
            first += len(own)
            found[case.mod.kind] = case.mod.on_host(tuple(of_tensor(tensor) for tensor in own), case.scalars)
        return found

    @property
    def fields(self) -> dict:
        """What the call has besides."""
        return {
            **{case.mod.kind: case.mod for case in self.mods},
            "mod_pointers": tuple(tensor.address for tensor in self.arrays),
            "mod_scalars": tuple(scalar for case in self.mods for scalar in case.scalars),
        }


def of_tensor(tensor: Tensor) -> np.ndarray:
    """Its values; of BF16, whose bits it has, as float32."""
    return as_float(tensor.array) if tensor.array.dtype == np.uint16 else tensor.array


def with_mods(case, *mods: ModCase, lengths=None) -> ModProblem:
    """The problem of a case with mods, uploaded."""
    plain = make_problem(case, lengths=lengths)
    rng = np.random.default_rng(zlib.crc32(f"mods of {case}".encode()))
    sizes = {"batch_size": case.batch, "num_heads": case.num_heads, "num_heads_k": case.num_heads_k}
    sizes |= {"seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    arrays = []
    for mod_case in mods:
        for element, shape in mod_case.mod.pointers:
            dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(element, element)
            extents = tuple(sizes.get(extent, extent) for extent in shape)
            tensor = contiguous(f"of {mod_case.mod.name}", extents, dtype)
            values = mod_case.fill(extents, rng)
            tensor.array[...] = values if dtype == element else to_bits(values.astype(np.float32), dtype)
            tensor.image.upload()
            arrays.append(tensor)
    own = {item.name: getattr(plain, item.name) for item in fields(plain)}
    return ModProblem(**own, mods=mods, arrays=tuple(arrays))


def mod_params(problem: ModProblem, **overrides):
    """The call of a problem with mods."""
    return params_of(problem, **problem.fields | overrides)
