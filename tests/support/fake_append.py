"""A GPU for the benchmark's tests whose forward appends to the cache and rotates first."""

import numpy as np
from fake_gpu import install, stored

from fa3_cute.contract.reference import update_cache


class AppendingGpu:
    """The fake forward, which writes to K and V first; `left_out` is a part of the step that it forgets."""

    def __init__(self, monkeypatch):
        self.gpu = install(monkeypatch)
        self.attend, self.left_out = self.gpu.forward, ""
        self.gpu.forward = self.forward
        self.gpu.packing_of = lambda p: self.packing
        self.packing = None

    def forward(self, p, stream):
        read, whole, in_cache = self.gpu.read, (p.batch_size,), stored(p.kv_dtype or p.dtype)
        q_shape = (*whole, 1, p.num_heads, p.head_dim)
        kv_rows, options = (p.batch_size, p.seqlen_k), {}
        if p.seqused_k:
            options["seqused_k"] = read(p.seqused_k, whole, np.int32).copy()
        if p.page_table:
            kv_rows = p.num_pages, p.page_size
            options["page_table"] = read(p.page_table, (p.batch_size, p.seqlen_k // p.page_size), np.int32)
        k, v = (read(pointer, (*kv_rows, p.num_heads_k, p.head_dim), in_cache) for pointer in (p.k, p.v))
        q = read(p.q, q_shape, stored(p.dtype))
        if p.k_new:
            shape = (p.batch_size, p.seqlen_knew, p.num_heads_k, p.head_dim)
            of_new = in_cache if p.kv_new_dtype is None else stored(p.kv_new_dtype)
            new = {name: read(getattr(p, name), shape, of_new) for name in ("k_new", "v_new")}
            if p.rotary_cos and self.left_out != "rotary":
                table = p.rotary_positions, p.rotary_dim // 2
                new |= {name: read(getattr(p, name), table) for name in ("rotary_cos", "rotary_sin")}
            if self.left_out == "values":
                new["v_new"] = np.zeros_like(new["v_new"])
            turned, used = update_cache(q, k, v, **new, **options)
            options["seqused_k"] = used - (self.left_out == "key")
            kept = q.copy()
            q[:] = turned
        # packed or dense, one query of each sequence is the same memory
        self.packing = options, ((p.batch_size, 1), kv_rows)
        status = self.attend(p, stream)
        if p.k_new:
            q[:] = kept
        return status
