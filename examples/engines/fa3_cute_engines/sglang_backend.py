"""SGLang's attention backend fa3_cute: packed queries over pages, in decode, in extend, and in its CUDA graphs.

Written for SGLang 0.5.23. SGLang's pool writes the cache; the table of pages is made of its table of tokens.
"""

from dataclasses import dataclass

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_exec

from fa3_cute.torch import flash_attn_with_kvcache

NAME = "fa3_cute"
FP8 = torch.float8_e4m3fn


def register() -> None:
    """The entry point of sglang.srt.plugins."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(Backend)


def _refuse(what: str, accepted: str) -> None:
    raise NotImplementedError(f"{NAME}: {what}: must be {accepted}")


@dataclass
class Metadata:
    """Of a step: where its sequences lie."""

    cache_seqlens: torch.Tensor
    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int


class Backend(AttentionBackend):
    """All layers' attention. Layers of MLA, cross attention and speculation with a tree are refused."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner):
        super().__init__()
        pool = model_runner.token_to_kv_pool
        if getattr(model_runner, "use_mla_backend", False):
            _refuse("MLA", "off: --attention-backend of another kind")
        if hasattr(pool, "full_to_swa_index_mapping"):
            _refuse("a pool of its own for sliding windows", "off: --disable-hybrid-swa-memory")
        if model_runner.kv_cache_dtype not in (torch.float16, torch.bfloat16, FP8):
            _refuse(f"--kv-cache-dtype {model_runner.kv_cache_dtype}", "auto, float16, bfloat16 or fp8_e4m3")
        self.token_to_kv_pool = pool
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.kv_cache_dtype, self.page_size = model_runner.kv_cache_dtype, model_runner.page_size
        self.max_pages = -(-model_runner.model_config.context_len // self.page_size)
        self.device = model_runner.device
        self.num_splits = 1 if get_exec().deterministic.enable_deterministic_inference else 0
        self.forward_metadata, self.captured = None, None

    # ---- metadata ----------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch) -> None:
        """Of a step that runs eagerly."""
        mode, batch = forward_batch.forward_mode, forward_batch.batch_size
        if forward_batch.spec_info is not None:
            _refuse("speculative decoding", "off")
        if mode.is_decode_or_idle():
            starts, longest = torch.arange(batch + 1, dtype=torch.int32, device=self.device), 1
        else:
            starts = torch.nn.functional.pad(forward_batch.extend_seq_lens.cumsum(0), (1, 0)).to(torch.int32)
            longest = max(forward_batch.extend_seq_lens_cpu, default=0)
        lengths = forward_batch.seq_lens.to(torch.int32)
        self.forward_metadata = Metadata(lengths, self._pages(forward_batch), starts, longest)

    def init_cuda_graph_state(self, max_bs, max_num_tokens) -> None:
        """Tensors whose addresses graphs of decode steps keep."""
        self.captured = Metadata(
            torch.ones(max_bs, dtype=torch.int32, device=self.device),
            torch.zeros(max_bs, self.max_pages, dtype=torch.int32, device=self.device),
            torch.arange(max_bs + 1, dtype=torch.int32, device=self.device),
            1,
        )

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False) -> None:
        """Of a decode step that is captured or replayed: the same, written where the graph reads it."""
        if not forward_batch.forward_mode.is_decode_or_idle() or forward_batch.spec_info is not None:
            _refuse("a CUDA graph of other steps than decode", "off: --disable-prefill-cuda-graph")
        batch, to = forward_batch.batch_size, self.captured
        to.cache_seqlens[:batch].copy_(forward_batch.seq_lens[:batch])
        to.page_table[:batch].copy_(self._pages(forward_batch))
        tables = to.cache_seqlens[:batch], to.page_table[:batch], to.cu_seqlens_q[: batch + 1]
        self.forward_metadata = Metadata(*tables, 1)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def _pages(self, forward_batch) -> torch.Tensor:
        """int32 [batch, max_pages]: entries past a sequence's length are anything, and never read."""
        tokens = self.req_to_token[forward_batch.req_pool_indices[: forward_batch.batch_size], :: self.page_size]
        return (tokens[:, : self.max_pages] // self.page_size).to(torch.int32)

    # ---- attention ---------------------------------------------------------------------------------------------------

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._attend((q, k, v), layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._attend((q, k, v), layer, forward_batch, save_kv_cache, **kwargs)

    def _attend(self, tensors, layer, forward_batch, save_kv_cache, sinks=None, **others) -> torch.Tensor:
        q, k, v = tensors
        for name, value in others.items():
            if value is not None and value is not False:
                _refuse(name, "absent")
        if layer.is_cross_attention:
            _refuse("cross attention", "absent")
        if save_kv_cache and k is not None:
            where = KVWriteLoc.for_layer(forward_batch, layer)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)
        k_cache, v_cache = (
            x.unflatten(0, (-1, self.page_size)) for x in self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        )
        scales = {}
        if self.kv_cache_dtype == FP8:
            q = q.to(FP8)
            if layer.k_scale is not None:
                scales = {"k_descale": layer.k_scale, "v_descale": layer.v_scale}
        causal, left, step = (
            layer.attn_type != AttentionType.ENCODER_ONLY,
            layer.sliding_window_size,
            self.forward_metadata,
        )
        out = flash_attn_with_kvcache(
            q.view(-1, layer.tp_q_head_num, layer.head_dim),
            k_cache,
            v_cache,
            cache_seqlens=step.cache_seqlens,
            page_table=step.page_table,
            cu_seqlens_q=step.cu_seqlens_q,
            max_seqlen_q=step.max_seqlen_q,
            softmax_scale=layer.scaling,
            causal=causal,
            window_size=(left, 0 if causal else left),
            softcap=layer.logit_cap,
            num_splits=self.num_splits,
            s_aux=sinks,
            **scales,
        )
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)
