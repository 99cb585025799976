"""The adapter for vLLM: numbers, metadata, what a captured graph sees, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from engine_stubs import recorded
from steps import CASES, HEADS, HEADS_K, MIXED, PAGE, Step, error, sinks_of

TOLERANCE = 2**-7
UNIT = torch.ones(())


@pytest.fixture
def adapter(engine, fake_device):
    return engine("vllm")


def common(step: Step, **more):
    """CommonAttentionMetadata, with all of its required fields."""
    fields = {
        "query_start_loc": step.starts,
        "query_start_loc_cpu": step.starts,
        "seq_lens": step.lengths,
        "num_reqs": len(step.keys),
        "num_actual_tokens": sum(step.queries),
        "max_query_len": max(step.queries),
        "max_seq_len": max(step.keys),
        "block_table_tensor": step.tables,
        "slot_mapping": step.slots(),
        "causal": True,
    } | more
    assert fields.keys() <= set(
        recorded("vllm", "vllm/v1/attention/backend.py", "CommonAttentionMetadata")["attributes"]
    )
    return SimpleNamespace(**fields)


def layer(**scales):
    return SimpleNamespace(**({"_q_scale": UNIT, "_k_scale": UNIT, "_v_scale": UNIT} | scales))


def cache_of(step: Step, dtype=torch.bfloat16) -> torch.Tensor:
    """[blocks, heads, block_size, 2 * head_size], NaN where nothing was written."""
    pool = torch.full((step.num_pages, HEADS_K, PAGE, 2 * step.dim), float("nan"), dtype=torch.bfloat16).to(dtype)
    rows = pool.transpose(1, 2)
    slots = step.slots(whole=True)
    stored = torch.cat([torch.cat([k, v], -1) for k, v in zip(step.k, step.v, strict=True)]).to(dtype)
    rows.view(torch.uint8 if dtype.itemsize == 1 else dtype)[slots // PAGE, slots % PAGE] = stored.view(
        torch.uint8 if dtype.itemsize == 1 else dtype
    )
    return pool


def metadata_of(adapter, step: Step, **more):
    builder = adapter.Builder(None, ["layer"], None, "cpu")
    return builder.build(common_prefix_len=0, common_attn_metadata=common(step, **more))


def run(impl, of_layer, step: Step, cache, metadata) -> torch.Tensor:
    """As vLLM calls a layer; rows of padding stay as they are."""
    output = torch.full((metadata.num_actual_tokens + 3, HEADS, step.dim), 7.0, dtype=torch.bfloat16)
    padded = torch.cat([step.q, step.q.new_zeros(len(output) - len(step.q), HEADS, step.dim)])
    q = padded.to(cache.dtype if impl.is_fp8 else padded.dtype)
    assert impl.forward(of_layer, q, None, None, cache, metadata, output) is output
    assert (output[metadata.num_actual_tokens :] == 7).all()
    return output[: len(step.q)]


def impl_of(adapter, case: dict | None = None, dim=64, **more):
    case = case or {}
    options = {"sliding_window": case.get("window"), "logits_soft_cap": case.get("softcap"), "sinks": sinks_of(case)}
    return adapter.Impl(HEADS, dim, dim**-0.5, HEADS_K, **options | more)


@pytest.mark.parametrize("name", CASES)
def test_a_mixed_step(name, adapter):
    """Decodes, a chunk and a prompt over one pool, in one call of the layer."""
    case, options = CASES[name]
    step = Step(*MIXED)
    found = run(impl_of(adapter, case), layer(), step, cache_of(step), metadata_of(adapter, step))
    assert error(found, step.expected(**options)) < TOLERANCE


@pytest.mark.parametrize("window, bounds", [(None, (-1, -1)), (8, (7, 7))])
def test_without_causality(window, bounds, adapter):
    step = Step(*MIXED)
    impl = impl_of(adapter, {"window": window})
    found = run(impl, layer(), step, cache_of(step), metadata_of(adapter, step, causal=False))
    assert error(found, step.expected(window_size=bounds)) < TOLERANCE


@pytest.mark.parametrize("by_head", [False, True])
def test_an_fp8_cache(by_head, adapter):
    """Scales of the layer, one or one for each KV head; queries are FP8 already."""
    step = Step(*MIXED).quantised()
    k_scale = torch.tensor([0.5, 1.5]) if by_head else torch.tensor(0.5)
    scales = {"_q_scale": torch.tensor([1.25]), "_k_scale": k_scale, "_v_scale": torch.tensor(0.75)}
    impl = impl_of(adapter, kv_cache_dtype="fp8")
    cache = cache_of(step, torch.float8_e4m3fn)
    found = run(impl, layer(**scales), step, cache, metadata_of(adapter, step))
    by_columns = k_scale.numpy()[:, None] if by_head else 0.5
    assert error(found, step.expected((1.25, by_columns, 0.75), causal=True)) < 2**-5


def test_the_cache_is_written_by_slots(adapter):
    """As vLLM's own operation has it: the step then finds its new keys."""
    step = Step(*MIXED)
    cache, slots = cache_of(step), step.slots()
    cache.transpose(1, 2)[slots // PAGE, slots % PAGE] = float("nan")
    impl, metadata = impl_of(adapter), metadata_of(adapter, step)
    impl.do_kv_cache_update(layer(), step.new(step.k), step.new(step.v), cache, metadata.slot_mapping)
    assert error(run(impl, layer(), step, cache, metadata), step.expected(causal=True)) < TOLERANCE


def test_a_captured_graph_sees_lengths_that_change(adapter, fake_device):
    """All that a replay may change lies in vLLM's own tensors: the call's addresses are those. A padded batch has
    sequences without queries, and without keys."""
    large = Step([1] * 3, [40, 33, 20])
    table = torch.zeros(4, 5, dtype=torch.int32)
    starts, lengths = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    table[:3, : large.tables.shape[1]], lengths[:3] = large.tables, large.lengths
    more = {"query_start_loc": starts, "seq_lens": lengths, "block_table_tensor": table, "num_reqs": 4}
    metadata, cache = metadata_of(adapter, large, **more), cache_of(large)
    impl = impl_of(adapter)
    assert error(run(impl, layer(), large, cache, metadata), large.expected(causal=True)) < TOLERANCE
    call = fake_device.calls[-1]
    addresses = call.cu_seqlens_q, call.seqused_k, call.page_table
    assert addresses == (starts.data_ptr(), lengths.data_ptr(), table.data_ptr()) and call.max_seqlen_q == 1
    large.k, large.v = ([x[:n] for x, n in zip(of, (9, 33, 1), strict=True)] for of in (large.k, large.v))
    lengths[:3] = torch.tensor([9, 33, 1])
    assert error(run(impl, layer(), large, cache, metadata), large.expected(causal=True)) < TOLERANCE


def test_another_table_for_another_group(adapter):
    step = Step(*MIXED)
    builder = adapter.Builder(None, ["layer"], None, "cpu")
    metadata = builder.build(0, common(step, block_table_tensor=torch.zeros_like(step.tables)))
    found = builder.update_block_table(metadata, step.tables, step.slots())
    assert (
        builder.supports_update_block_table and found.block_table is step.tables and found.seq_lens is metadata.seq_lens
    )
    assert error(run(impl_of(adapter), layer(), step, cache_of(step), found), step.expected(causal=True)) < TOLERANCE


def test_batch_invariance_is_no_splits(adapter, monkeypatch, fake_device):
    monkeypatch.setattr(adapter.envs, "VLLM_BATCH_INVARIANT", True)
    step = Step(*MIXED)
    run(impl_of(adapter), layer(), step, cache_of(step), metadata_of(adapter, step))
    assert fake_device.calls[-1].num_splits == 1


def test_a_run_that_measures_memory(adapter, fake_device):
    output = torch.ones(3, HEADS, 64)
    impl_of(adapter).forward(layer(), output, None, None, torch.empty(0), None, output)
    assert not output.any() and not fake_device.calls


def test_what_the_backend_says(adapter):
    backend, capability = adapter.Backend, SimpleNamespace(major=9, minor=0)
    assert backend.supports_compute_capability(capability)
    assert not backend.supports_compute_capability(SimpleNamespace(major=10, minor=0))
    assert [backend.supports_head_size(n) for n in (64, 80, 100, 256, 512)] == [True, True, False, True, False]
    rest = (torch.bfloat16, "fp8", 16, False, False, False, False, capability)
    assert "FP8" in backend.supports_combination(192, *rest) and backend.supports_combination(128, *rest) is None
    assert backend.get_builder_cls() is adapter.Builder and backend.get_impl_cls() is adapter.Impl
    adapter.register()
    from vllm.v1.attention.backends.registry import registered

    assert registered == {"FA3_CUTE": f"{adapter.__name__}.Backend"}


@pytest.mark.parametrize(
    "options, words",
    [({"alibi_slopes": [1.0] * 4}, "alibi_slopes"), ({"attn_type": "encoder"}, "attn_type=encoder")],
)
def test_refused_layers(options, words, adapter):
    with pytest.raises(NotImplementedError, match=words):
        impl_of(adapter, **options)


def test_refused_steps(adapter):
    step = Step(*MIXED)
    with pytest.raises(NotImplementedError, match="causal of each sequence"):
        metadata_of(adapter, step, causal=torch.ones(4, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="output_scale"):
        impl_of(adapter).forward(layer(), step.q, None, None, step.q, None, step.q, output_scale=UNIT)
