"""vLLM's attention backend FA3_CUTE: packed queries over pages, decodes and prompts in one call of each layer.

Written for vLLM 0.33. vLLM writes the cache (reshape_and_cache_flash), quantises q where the cache is FP8, and gives
what stands in CommonAttentionMetadata; nothing is computed ahead, so that a captured graph replays with any lengths.
"""

from dataclasses import dataclass, replace

import torch
import vllm.envs as envs
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

from fa3_cute.torch import flash_attn_with_kvcache

NAME = "FA3_CUTE"
FP8 = ("fp8", "fp8_e4m3")
MAX_HEAD_SIZE, MAX_HEAD_SIZE_FP8 = 256, 128


def register() -> None:
    """The entry point of vllm.general_plugins."""
    from vllm.v1.attention.backends.registry import register_backend

    register_backend(NAME, f"{__name__}.Backend")


class Backend(AttentionBackend):
    """What is served; vLLM asks before it takes the backend for a layer."""

    supported_dtypes = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16", *FP8]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type["Impl"]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type["Builder"]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        return [MultipleOf(16)]  # pages of any size are right; those of a multiple of 8 rows are read by TMA

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and head_size <= MAX_HEAD_SIZE

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return (capability.major, capability.minor) == (9, 0)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls,
        head_size,
        dtype,
        kv_cache_dtype,
        block_size,
        use_mla,
        has_sink,
        use_sparse,
        use_mm_prefix,
        device_capability,
    ) -> str | None:
        if kv_cache_dtype in FP8 and (head_size % 16 or head_size > MAX_HEAD_SIZE_FP8):
            return f"an FP8 cache has kernels for head sizes that are multiples of 16 up to {MAX_HEAD_SIZE_FP8}"
        return None


@dataclass
class Metadata(AttentionMetadata):
    """Of a step: its tensors, as vLLM keeps them from step to step, and host numbers that are bounds."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool


class Builder(AttentionMetadataBuilder):
    """Metadata of a step, for all layers of a group."""

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> Metadata:
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise NotImplementedError(f"{NAME}: causal of each sequence: must be one bool for all")
        return Metadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=bool(common.causal),
        )

    def update_block_table(self, metadata, blk_table, slot_mapping) -> Metadata:
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class Impl(AttentionImpl):
    """One layer's attention."""

    supports_quant_query_input = True

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads=None,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype="auto",
        logits_soft_cap=None,
        attn_type=AttentionType.DECODER,
        kv_sharing_target_layer_name=None,
        sinks=None,
    ):
        if alibi_slopes is not None:
            raise NotImplementedError(f"{NAME}: alibi_slopes: must be None")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"{NAME}: attn_type={attn_type}: must be decoder")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.left = -1 if sliding_window is None else sliding_window - 1  # vLLM counts a query's own key
        self.kv_cache_dtype, self.is_fp8 = kv_cache_dtype, kv_cache_dtype in FP8
        self.softcap, self.sinks = logits_soft_cap or 0.0, sinks
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.num_splits = 1 if envs.VLLM_BATCH_INVARIANT else 0

    def forward(
        self,
        layer,
        query,
        key,
        value,
        kv_cache,
        attn_metadata,
        output,
        output_scale=None,
        output_block_scale=None,
    ) -> torch.Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{NAME}: output_scale: must be None")
        if attn_metadata is None:  # a run that measures memory
            return output.fill_(0)
        tokens, causal = attn_metadata.num_actual_tokens, attn_metadata.causal
        k_cache, v_cache = self._caches(kv_cache)
        scales = {}
        if self.is_fp8:
            scales = {"q_descale": layer._q_scale, "k_descale": layer._k_scale, "v_descale": layer._v_scale}
        flash_attn_with_kvcache(
            query[:tokens],
            k_cache,
            v_cache,
            cache_seqlens=attn_metadata.seq_lens,
            page_table=attn_metadata.block_table,
            cu_seqlens_q=attn_metadata.query_start_loc,
            max_seqlen_q=attn_metadata.max_query_len,
            softmax_scale=self.scale,
            causal=causal,
            window_size=(self.left, 0 if causal else self.left),
            softcap=self.softcap,
            num_splits=self.num_splits,
            s_aux=self.sinks,
            out=output[:tokens].view(-1, self.num_heads, self.head_size),
            **scales,
        )
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """Called by vLLM ahead of forward, where a layer has a cache of its own."""
        k_cache, v_cache = self._caches(kv_cache, as_stored=True)
        scales = layer._k_scale, layer._v_scale
        reshape_and_cache_flash(key, value, k_cache, v_cache, slot_mapping, self.kv_cache_dtype, *scales)

    def _caches(self, kv_cache: torch.Tensor, as_stored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, [blocks, block_size, heads, head_size], of [blocks, heads, block_size, 2 * head_size]; vLLM stores
        FP8 as bytes."""
        if self.is_fp8 and not as_stored:
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return k_cache, v_cache
