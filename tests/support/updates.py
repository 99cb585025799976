"""Calls that append to a cache and rotate: inputs, what must come out, and the call on a device."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from check import RULE_16_BIT, RULE_FP8
from tolerance import assert_errors, errors

from fa3_cute import AttentionMode, DataType, FlashAttentionParams
from fa3_cute.arrays import memory as cuda
from fa3_cute.contract.reference import as_float, attention_reference, low_precision_twin, to_bits, update_cache

ULP = {"fp16": 2.0**-10, "bf16": 2.0**-7}  # of a number, at most
INTEGERS = (
    "cu_seqlens_q",
    "seqused_k",
    "page_table",
    "kv_batch_idx",
    "leftpad_k",
    "cu_seqlens_k_new",
    "seqlens_rotary",
)
UPDATES = ("k_new", "v_new", "cu_seqlens_k_new", "rotary_cos", "rotary_sin", "seqlens_rotary", "rotary_interleaved")
E4M3_STEP = 2.0**-3  # of a number, at most, from it to the next


@dataclass(frozen=True)
class Update:
    """What is asked for.

    old, new      lengths of the sequences, and how many rows come to each; new None: none
    queries       of each sequence; packs_queries, packs_new: packed, the new rows with some behind the last sequence's
    page_size     0: entries of `capacity` rows; is_indexed: the sequences choose theirs
    rotary        "halves", "neighbours" or ""; rotary_dim of head_dim; table_dtype of the tables
    kv_dtype      of k and v, "": dtype; new rows of dtype are then quantised, unless is_new_stored: they are FP8 too
    leftpad       first rows of each sequence that do not exist
    starts        positions of the first new keys; None: the old lengths
    """

    dtype: str = "bf16"
    head_dim: int = 128
    head_dim_v: int = 0
    heads: tuple[int, int] = (8, 2)
    old: tuple[int, ...] = (0, 5, 511, 300)
    new: tuple[int, ...] | None = (3, 3, 3, 3)
    queries: tuple[int, ...] = (1, 1, 1, 1)
    packs_queries: bool = False
    packs_new: bool = False
    page_size: int = 0
    capacity: int = 512
    is_indexed: bool = False
    leftpad: tuple[int, ...] | None = None
    rotary: str = ""
    rotary_dim: int = 64
    table_dtype: str = "fp32"
    starts: tuple[int, ...] | None = None
    kv_dtype: str = ""
    is_new_stored: bool = False
    is_causal: bool = True
    seed: int = 0


class UpdateProblem:
    """Arrays by the names of params and of the reference; of k and v all that is not used holds NaN."""

    def __init__(self, update: Update):
        self.update, self.rng = update, np.random.default_rng(update.seed)
        heads, heads_k = update.heads
        queries = (sum(update.queries),) if update.packs_queries else (len(update.old), update.queries[0])
        self.arrays: dict[str, Any] = {"q": self.rows(*queries, heads)}
        self.options: dict[str, Any] = {"causal": update.is_causal}
        self.make_cache(heads_k)
        if update.packs_queries:
            self.arrays["cu_seqlens_q"] = offsets(update.queries)
        if update.new is not None:
            new = (sum(update.new) + 2,) if update.packs_new else (len(update.old), update.new[0])
            dtype = self.stored if update.is_new_stored else update.dtype
            for name, columns in (("k_new", 0), ("v_new", self.dim_v)):
                self.arrays[name] = self.rows(*new, heads_k, columns=columns, dtype=dtype)
            if update.packs_new:
                self.arrays["cu_seqlens_k_new"] = offsets(update.new)
        if update.rotary:
            self.make_tables()
        if update.kv_dtype:  # so small that some new values are beyond 448 of them
            for name in ("k_descale", "v_descale"):
                scales = self.rng.uniform(2.0**-8, 2.0**-5, (len(update.old), heads_k))
                self.arrays[name] = scales.astype(np.float32)

    @property
    def stored(self) -> str:
        """The dtype of k and v."""
        return self.update.kv_dtype or self.update.dtype

    @property
    def dim_v(self) -> int:
        """Columns of v and out."""
        return self.update.head_dim_v or self.update.head_dim

    def rows(self, *shape, columns: int = 0, dtype: str = ""):
        numbers = self.rng.standard_normal((*shape, columns or self.update.head_dim))
        return to_bits(numbers, dtype or self.update.dtype)

    def make_cache(self, heads_k: int) -> None:
        update, batch = self.update, len(self.update.old)
        entries = self.rng.permutation(batch + 2)[:batch] if update.is_indexed else np.arange(batch)
        shape, table = (batch + 2 * update.is_indexed, update.capacity), None
        if update.page_size:
            pages = update.capacity // update.page_size
            shape = (batch * pages + 3, update.page_size)
            table = np.full((batch + 2 * update.is_indexed, pages), -1, np.int32)
            table[entries] = self.rng.permutation(shape[0])[: batch * pages].reshape(batch, pages)
        for name in ("k", "v"):
            cache = self.rows(*shape, heads_k, columns=self.dim_v if name == "v" else 0, dtype=self.stored)
            unused = np.ones(shape, bool)
            for entry, n, pad in zip(entries, update.old, update.leftpad or [0] * batch, strict=True):
                at = np.arange(pad, n)
                unused[(entry, at) if table is None else (table[entry, at // shape[1]], at % shape[1])] = False
            bits(cache)[unused] = np.iinfo(bits(cache).dtype).max  # NaN
            self.arrays[name] = cache
        if table is not None:
            self.arrays["page_table"] = table
        if update.is_indexed:
            self.arrays["kv_batch_idx"] = entries.astype(np.int32)
        if update.leftpad:
            self.arrays["leftpad_k"] = np.array(update.leftpad, np.int32)
        self.arrays["seqused_k"] = np.array(update.old, np.int32)

    def make_tables(self) -> None:
        update = self.update
        angles = self.rng.uniform(-3, 3, (update.capacity + 64, update.rotary_dim // 2))
        for name, table in (("rotary_cos", np.cos(angles)), ("rotary_sin", np.sin(angles))):
            self.arrays[name] = to_bits(table, update.table_dtype)
        if update.starts is not None:
            self.arrays["seqlens_rotary"] = np.array(update.starts, np.int32)
        self.options["rotary_interleaved"] = update.rotary == "neighbours"

    # ---- what must come out --------------------------------------------------------------------------------------

    def expected_caches(self) -> tuple[np.ndarray, dict, tuple[np.ndarray, np.ndarray]]:
        """(q, options of attention that are left, k and v)."""
        given = self.arrays | self.options
        q, k, v = given.pop("q"), given.pop("k").copy(), given.pop("v").copy()
        q, used = update_cache(q, k, v, **given)
        left = {name: value for name, value in given.items() if name not in UPDATES}
        return q, left | {"seqused_k": used}, (k, v)

    def check(self, found: dict) -> None:
        """Raise unless k, v, out and the LSE of these arrays are right; the cache in all its bits, but where rotation
        may round otherwise."""
        dtype = self.update.dtype
        q, options, (k, v) = self.expected_caches()
        assert np.array_equal(bits(found["v"]), bits(v)), "v is not what was to be written"
        differ = bits(found["k"]) != bits(k)
        if self.update.rotary:
            written = bits(k) != bits(self.arrays["k"])
            assert not (differ & ~written.any(axis=-1, keepdims=True)).any(), "k was written elsewhere"
            step = E4M3_STEP if self.update.kv_dtype else ULP[dtype]
            smallest = 2.0**-9 if self.update.kv_dtype else 1e-6
            wrong = np.abs(as_float(found["k"]) - as_float(k)) > step * np.abs(as_float(k)) + smallest
            assert not wrong[differ].any() and differ.mean() < 0.01, "k is not what rotation makes"
        else:
            assert not differ.any(), "k is not what was to be written"
        exact, lse = attention_reference(q, found["k"], found["v"], **options)
        twin, _ = low_precision_twin(q, found["k"], found["v"], dtype, **options)
        rule = RULE_FP8 if dtype == "fp8_e4m3" else RULE_16_BIT
        assert_errors(rule, *errors(as_float(found["out"]), exact, twin))
        np.testing.assert_allclose(found["lse"], lse, atol=2e-3 if dtype != "fp8_e4m3" else 1e-2)

    # ---- on a device ---------------------------------------------------------------------------------------------

    def upload(self, stream) -> None:
        """To buffers that stay where they are."""
        buffers = getattr(self, "buffers", None) or dict.fromkeys(self.arrays)
        self.buffers = {name: cuda.upload(array, buffers[name], stream=stream) for name, array in self.arrays.items()}
        q = self.arrays["q"]
        *self.lse_shape, rows = *q.shape[:-3], self.update.heads[0], q.shape[-3]
        self.lse_shape.append(rows)
        if "out" not in self.buffers:
            size = q.size // q.shape[-1] * self.dim_v
            self.out, self.lse = cuda.allocate(2 * size, stream=stream), cuda.allocate(4 * q.size, stream=stream)

    def params(self, **changes) -> FlashAttentionParams:
        """The call."""
        update = self.update
        heads, heads_k = update.heads
        fields = {name: cuda.address(buffer) for name, buffer in self.buffers.items()}
        fields |= {"batch_size": len(update.old), "num_heads": heads, "num_heads_k": heads_k}
        fields |= {
            "head_dim": update.head_dim,
            "head_dim_v": update.head_dim_v,
            "dtype": DataType[update.dtype.upper()],
            "seqlen_k": update.capacity,
        }
        if update.kv_dtype:
            fields |= {"kv_dtype": DataType[update.kv_dtype.upper()]}
            fields |= {f"{name}_descale_ptr": fields.pop(f"{name}_descale") for name in "kv"}
            fields |= {
                f"{name}_descale_{dim}_stride": n for name in "kv" for dim, n in (("batch", heads_k), ("head", 1))
            }
            if update.new is not None and not update.is_new_stored:
                fields["kv_new_dtype"] = fields["dtype"]
        fields |= {"out": cuda.address(self.out), "softmax_lse": cuda.address(self.lse), "is_causal": update.is_causal}
        fields |= {"seqlen_q": update.queries[0]}
        if update.packs_queries:
            fields |= {"mode": AttentionMode.VARLEN_PREFILL, "total_q": sum(update.queries)}
        if update.new is not None:
            fields["seqlen_knew"] = len(self.arrays["k_new"]) if update.packs_new else update.new[0]
        if update.page_size:
            fields |= {"page_size": update.page_size, "num_pages": len(self.arrays["k"])}
        if update.is_indexed:
            fields["batch_size_k"] = len(update.old) + 2
        if update.rotary:
            tables = {"rotary_dim": update.rotary_dim, "rotary_positions": update.capacity + 64}
            tables |= {"rotary_interleaved": update.rotary == "neighbours"}
            fields |= tables | {"rotary_dtype": DataType[update.table_dtype.upper()]}
        return FlashAttentionParams(**fields | changes)

    def results(self, stream) -> dict[str, np.ndarray]:
        """What `check` takes."""
        found = {
            name: cuda.download(self.buffers[name], self.arrays[name].shape, self.arrays[name].dtype, stream=stream)
            for name in ("k", "v")
        }
        dtype = np.float16 if self.update.dtype == "fp16" else np.uint16
        found["out"] = cuda.download(self.out, (*self.arrays["q"].shape[:-1], self.dim_v), dtype, stream=stream)
        return found | {"lse": cuda.download(self.lse, tuple(self.lse_shape), np.float32, stream=stream)}


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory: NaN is equal to itself then."""
    return array.view(np.uint16) if array.dtype == np.float16 else array


def offsets(lengths: tuple[int, ...]) -> np.ndarray:
    return np.cumsum((0, *lengths)).astype(np.int32)
