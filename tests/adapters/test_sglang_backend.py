"""The adapter for SGLang: numbers, metadata of eager and of captured steps, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from engine_stubs import recorded
from steps import CASES, HEADS, HEADS_K, MIXED, PAGE, Step, error, sinks_of

TOLERANCE = 2**-7
CONTEXT = 96  # of the model


@pytest.fixture
def adapter(engine, fake_device):
    return engine("sglang")


class Pool:
    """K and V of one layer by tokens, as MHATokenToKVPool hands them over."""

    def __init__(self, step: Step, dtype):
        self.buffers = [torch.zeros(step.num_pages * PAGE, HEADS_K, step.dim, dtype=dtype) for _ in "kv"]
        for buffer, of in zip(self.buffers, (step.k, step.v), strict=True):
            _bytes(buffer)[step.slots(whole=True)] = _bytes(torch.cat(of).to(dtype))

    def get_kv_buffer(self, layer_id):
        assert layer_id == 3
        return tuple(self.buffers)

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=None, v_scale=None):
        for buffer, rows in zip(self.buffers, (cache_k, cache_v), strict=True):
            _bytes(buffer)[loc_info] = _bytes(rows.to(buffer.dtype))


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def backend_of(adapter, step: Step, dtype=torch.bfloat16, **more):
    """The backend of a runner whose table of tokens has the step's in its rows 5, 4 and so on."""
    tokens = torch.zeros(6, CONTEXT, dtype=torch.int32)
    for row, n in enumerate(step.keys):
        places = torch.arange(n)
        tokens[5 - row, :n] = step.tables[row, places // PAGE] * PAGE + places % PAGE
    runner = SimpleNamespace(
        token_to_kv_pool=Pool(step, dtype),
        req_to_token_pool=SimpleNamespace(req_to_token=tokens),
        kv_cache_dtype=dtype,
        page_size=PAGE,
        model_config=SimpleNamespace(context_len=CONTEXT),
        device="cpu",
    )
    return adapter.Backend(SimpleNamespace(**vars(runner) | more))


def batch_of(step: Step, **more):
    """A ForwardBatch: decode where each sequence has one query, else extend."""
    is_decode = set(step.queries) == {1}
    fields = {
        "forward_mode": SimpleNamespace(is_decode_or_idle=lambda: is_decode),
        "batch_size": len(step.keys),
        "req_pool_indices": torch.tensor([5 - row for row in range(len(step.keys))]),
        "seq_lens": torch.tensor(step.keys),
        "out_cache_loc": step.slots(),
        "extend_seq_lens": None if is_decode else torch.tensor(step.queries),
        "extend_seq_lens_cpu": None if is_decode else list(step.queries),
        "spec_info": None,
    } | more
    file = "sglang/srt/model_executor/forward_batch_info.py"
    assert fields.keys() <= set(recorded("sglang", file, "ForwardBatch")["attributes"])
    return SimpleNamespace(**fields)


def layer_of(case: dict | None = None, **more):
    """A RadixAttention; its window does not count the query's own key."""
    case = case or {}
    fields = {
        "layer_id": 3,
        "tp_q_head_num": HEADS,
        "head_dim": 64,
        "v_head_dim": 64,
        "scaling": 64**-0.5,
        "logit_cap": case.get("softcap", 0.0),
        "sliding_window_size": case.get("window", 0) - 1,
        "is_cross_attention": False,
        "attn_type": "decoder",
        "k_scale": None,
        "v_scale": None,
    } | more
    assert fields.keys() <= set(
        recorded("sglang", "sglang/srt/layers/radix_attention.py", "RadixAttention")["attributes"]
    )
    return SimpleNamespace(**fields)


def run(backend, step: Step, layer, batch, **options) -> torch.Tensor:
    forward = backend.forward_decode if set(step.queries) == {1} else backend.forward_extend
    found = forward(step.q.flatten(1), step.new(step.k), step.new(step.v), layer, batch, **options)
    return found.view(-1, HEADS, step.dim)


@pytest.mark.parametrize("queries, keys", [MIXED, ([1] * 4, [33, 5, 47, 1])], ids=["extend", "decode"])
@pytest.mark.parametrize("name", CASES)
def test_a_step(name, queries, keys, adapter):
    """New rows are written by the pool, and attended."""
    case, options = CASES[name]
    step = Step(queries, keys)
    backend, batch = backend_of(adapter, step), batch_of(step)
    for buffer in backend.token_to_kv_pool.buffers:
        buffer[step.slots()] = float("nan")
    backend.init_forward_metadata(batch)
    found = run(backend, step, layer_of(case), batch, sinks=sinks_of(case))
    assert error(found, step.expected(**options)) < TOLERANCE


def test_an_encoder_looks_both_ways(adapter):
    step = Step([7, 20], [7, 20])
    backend, batch = backend_of(adapter, step), batch_of(step)
    backend.init_forward_metadata(batch)
    found = run(backend, step, layer_of({"window": 5}, attn_type="encoder_only"), batch)
    assert error(found, step.expected(window_size=(4, 4))) < TOLERANCE


def test_an_fp8_cache(adapter):
    step = Step(*MIXED).quantised()
    backend, batch = backend_of(adapter, step, torch.float8_e4m3fn), batch_of(step)
    backend.init_forward_metadata(batch)
    layer = layer_of(k_scale=torch.tensor(0.5), v_scale=torch.tensor([0.75]))
    found = run(backend, step, layer, batch)
    assert found.dtype == torch.bfloat16
    assert error(found, step.expected((1.0, 0.5, 0.75), causal=True)) < 2**-5


def test_graphs_of_decode_steps(adapter, fake_device):
    """Captured with one batch and replayed with another: the same addresses, other lengths and pages."""
    small, large = Step([1] * 3, [1, 1, 1]), Step([1] * 3, [40, 33, 20])
    backend = backend_of(adapter, large)
    backend.init_cuda_graph_state(max_bs=8, max_num_tokens=8)
    backend.init_forward_metadata_out_graph(batch_of(small), in_capture=True)
    run(backend, small, layer_of(), batch_of(small), save_kv_cache=False)
    captured = fake_device.calls[-1]
    backend.init_forward_metadata_out_graph(batch_of(large))
    found = run(backend, large, layer_of(), batch_of(large), save_kv_cache=False)
    replayed = fake_device.calls[-1]
    for name in ("cu_seqlens_q", "seqused_k", "page_table", "seqlen_k", "max_seqlen_q", "num_pages"):
        assert getattr(captured, name) == getattr(replayed, name), name
    assert error(found, large.expected(causal=True)) < TOLERANCE
    assert backend.get_cuda_graph_seq_len_fill_value() == 1 and not backend.needs_cpu_seq_lens


def test_deterministic_inference_is_no_splits(adapter, monkeypatch, fake_device):
    deterministic = SimpleNamespace(enable_deterministic_inference=True)
    monkeypatch.setattr(adapter, "get_exec", lambda: SimpleNamespace(deterministic=deterministic))
    step = Step(*MIXED)
    backend, batch = backend_of(adapter, step), batch_of(step)
    backend.init_forward_metadata(batch)
    run(backend, step, layer_of(), batch)
    assert fake_device.calls[-1].num_splits == 1


def test_registration(adapter):
    adapter.register()
    from sglang.srt.layers.attention.attention_registry import backends
    from sglang.srt.server_args import choices

    assert backends == {"fa3_cute": adapter.Backend} and choices == ["fa3_cute"]


RUNNERS = {
    "MLA": {"use_mla_backend": True},
    "sliding windows": {"token_to_kv_pool": SimpleNamespace(full_to_swa_index_mapping=None)},
    "kv-cache-dtype": {"kv_cache_dtype": torch.float8_e5m2},
}


@pytest.mark.parametrize("words", RUNNERS)
def test_refused_runners(words, adapter):
    with pytest.raises(NotImplementedError, match=words):
        backend_of(adapter, Step(*MIXED), **RUNNERS[words])


def test_refused_calls(adapter):
    step = Step(*MIXED)
    backend, batch = backend_of(adapter, step), batch_of(step)
    backend.init_forward_metadata(batch)
    for options, words in (({"q_rope": step.q}, "q_rope"), ({"return_lse": True}, "return_lse")):
        with pytest.raises(NotImplementedError, match=words):
            run(backend, step, layer_of(), batch, **options)
    with pytest.raises(NotImplementedError, match="cross attention"):
        run(backend, step, layer_of(is_cross_attention=True), batch)
    with pytest.raises(NotImplementedError, match="speculative"):
        backend.init_forward_metadata(batch_of(step, spec_info=object()))
    with pytest.raises(NotImplementedError, match="other steps than decode"):
        backend.init_forward_metadata_out_graph(batch)
