"""Calls of flash-attn's functions: what they compute, on the CPU and as params of a device."""

import math

import pytest
import torch
from tensors import BF16, CALLS, FP8, append, ints, packed, qkv, rand, rotary

from fa3_cute import explain
from fa3_cute.contract.status import FlashAttentionError, Status, UnsupportedFeatureError
from fa3_cute.torch import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, merge_attention

ERROR_BF16 = 2**-7


def exact(q, k, v, mask=None, softcap=0.0, s_aux=None):
    """(out, LSE) in float64 of dense tensors; mask True where a query sees a key, s_aux one more of value 0."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.double()[:, None, None].expand(*scores.shape[:3], 1)), -1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1)[..., : k.shape[1]], v), scores.logsumexp(-1)


def diagonals(seqlen_q, seqlen_k, left=None, right=None):
    distance = torch.arange(seqlen_k)[None] - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    return (distance >= (-math.inf if left is None else -left)) & (distance <= (math.inf if right is None else right))


@pytest.mark.parametrize(
    "options, bounds",
    [
        ({}, {}),
        ({"causal": True}, {"right": 0}),
        ({"causal": True, "window_size": (-1, 3)}, {"right": 0}),
        ({"causal": True, "window_size": (8, 3)}, {"left": 8, "right": 0}),
        ({"window_size": (8, 3)}, {"left": 8, "right": 3}),
        ({"window_size": (8, -1)}, {"left": 8}),
    ],
)
def test_masks_are_flash_attns(options, bounds):
    q, k, v = qkv()
    out, lse = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    expected, expected_lse = exact(q, k, v, diagonals(24, 40, **bounds))
    assert out.dtype == BF16 and out.shape == q.shape and lse.dtype == torch.float32 and lse.shape == (2, 4, 24)
    assert (out.double() - expected).abs().max() <= ERROR_BF16
    assert (lse - expected_lse).abs().max() < 1e-5
    assert torch.equal(flash_attn_func(q, k, v, **options), out)


@pytest.mark.parametrize("name", CALLS)
def test_params_say_what_the_call_says(fake_device, monkeypatch, name):
    """The same from the params of a device as from the tensors on the CPU, and from a plan that is used again."""
    first = CALLS[name]()
    second = CALLS[name]()
    assert len(fake_device.calls) == 2 and fake_device.streams == [0x7770] * 2
    monkeypatch.undo()
    expected = CALLS[name]()
    for got in (first, second):
        assert got[0].dtype == expected[0].dtype
        assert torch.allclose(got[0].float(), expected[0].float(), rtol=2**-7, atol=0)
        assert torch.equal(got[1], expected[1]) and not got[1].isnan().any()


def test_params_of_the_choices(fake_device):
    q, k, v = qkv()
    flash_attn_func(q, k, v, num_splits=3, pack_gqa=True, sm_margin=8)
    params = fake_device.calls[-1]
    assert (params.num_splits, params.pack_gqa, params.sm_margin, params.softmax_lse) == (3, True, 8, None)
    flash_attn_varlen_func(*packed(), 33, 49)
    assert (fake_device.calls[-1].max_seqlen_q, fake_device.calls[-1].num_splits) == (33, 1)
    assert flash_attn_with_kvcache(q, k, v).shape == q.shape and fake_device.calls[-1].num_splits == 0


def test_a_plan_is_of_all_that_a_call_is(fake_device):
    """Of shapes that are equal, and strides, options or dtypes that are not."""
    q, k, v = qkv()
    for changed in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q.half()):
        same = [x.to(changed.dtype) for x in (k, v)]
        for options in ({}, {"causal": True}, {"softmax_scale": 0.5}):
            out = flash_attn_func(changed, *same, **options)
            assert out.dtype == changed.dtype and explain(fake_device.calls[-1]) == []
    assert len({(c.q_row_stride, c.dtype, c.is_causal, c.softmax_scale) for c in fake_device.calls}) == 9


def test_scratch_memory_is_torchs(fake_device):
    """Splits need a workspace; a capture has counters of its own besides, which are 0."""
    q, k, v = qkv(seqlen_q=1, seqlen_k=4096, dim=128)
    call = {"cache_seqlens": ints(4096, 4096), "num_splits": 20}
    expected = flash_attn_with_kvcache(q, k, v, **call)
    params = fake_device.calls[-1]
    assert params.workspace and params.workspace_bytes > 0 and params.tile_counter is None
    fake_device.is_capturing = True
    asked = []
    original = torch.zeros

    def zeros(*size, **options):
        asked.append((size, options["dtype"]))
        return original(*size, **options)

    torch.zeros = zeros
    try:
        assert torch.equal(flash_attn_with_kvcache(q, k, v, **call), expected)
        flash_attn_func(q, k, v)
    finally:
        torch.zeros = original
    split, prefill = fake_device.calls[-2:]
    assert split.workspace and split.tile_counter and prefill.tile_counter and prefill.workspace is None
    bytes_of_counters = [4 * size[0] for size, dtype in asked if dtype == torch.int32]
    assert bytes_of_counters == [-(-split.workspace_bytes // 32) * 4, 4]
    fake_device.is_capturing = False
    flash_attn_func(q, k, v)
    assert fake_device.calls[-1].tile_counter is None


def test_rows_of_any_length_without_queries_or_keys(fake_device):
    q, k, v, cu_q, cu_k = packed()
    out, lse = flash_attn_varlen_func(q[:0], k, v, 0 * cu_q, cu_k, 0, 49, return_attn_probs=True)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0) and not fake_device.calls
    out, lse = flash_attn_varlen_func(q, k[:0], v[:0], cu_q, 0 * cu_k, 33, 0, return_attn_probs=True)
    assert not out.any() and (lse == -math.inf).all()


def test_a_last_dimension_of_any_stride(fake_device):
    q, k, v = qkv()
    expected = flash_attn_func(q, k, v)
    spread = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert torch.equal(flash_attn_func(*spread), expected)
    new = rand(2, 3, 2, 64, seed=4)
    lengths = {"cache_seqlens": ints(5, 9), "causal": True}
    caches = [[x.clone() for x in (k, v)] for _ in range(2)]
    expected = flash_attn_with_kvcache(q[:, :3], *caches[0], new, new, **lengths)
    found = flash_attn_with_kvcache(transposed(q[:, :3]), *caches[1], transposed(new), transposed(new), **lengths)
    assert torch.equal(found, expected) and torch.equal(caches[0][0], caches[1][0])


def test_merge_attention(fake_device, monkeypatch):
    q, k, v = qkv()
    whole, whole_lse = flash_attn_func(q, k, v, return_attn_probs=True)
    a = flash_attn_func(q, k[:, :13], v[:, :13], return_attn_probs=True)
    b = flash_attn_func(q, k[:, 13:], v[:, 13:], return_attn_probs=True)
    monkeypatch.undo()
    out, lse = merge_attention(*a, *b)
    assert (out.float() - whole.float()).abs().max() <= 2 * ERROR_BF16 and (lse - whole_lse).abs().max() < 1e-5


def test_merge_attention_as_params(fake_device):
    from fa3_cute.torch import device, host
    from fa3_cute.torch.calls import MergeCall

    of_a, of_b = (rand(2, 5, 3, 64, dtype=torch.float32, seed=seed) for seed in (1, 2))
    lse_a, lse_b = rand(2, 3, 5, dtype=torch.float32), rand(5, 2, 3, dtype=torch.float32).permute(1, 2, 0)
    call = MergeCall(of_a, lse_a, of_b, lse_b)
    for got, expected in zip(device.merge(call), host.merge(call), strict=True):
        assert torch.equal(got, expected)
    flat = MergeCall(of_a[0], lse_a[0], of_b[0], lse_b[0])
    for got, expected in zip(device.merge(flat), host.merge(flat), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("where", ["device", "host", "compiled"])
def test_new_rows_are_written_behind_the_old_ones(where, request):
    """Rotated by their positions; nothing else of the cache changes, autograd hears of it, and attention sees them."""
    if where == "device":
        request.getfixturevalue("fake_device")
    before = [rand(2, 150, 2, 64, seed=seed) for seed in (1, 2)]
    caches = [x.clone() for x in before]
    call = flash_attn_with_kvcache
    if where == "compiled":
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    tables = rotary()
    with torch.no_grad():
        out, lse = append(caches=caches, call=call, **tables)
    new = rand(2, 3, 2, 2, 64, seed=4)
    for b, length in enumerate((140, 7)):
        angles = [tables[name][length : length + 3, None].double() for name in ("rotary_cos", "rotary_sin")]
        before[0][b, length : length + 3] = neighbours_turned(new[b, ..., 0, :], *angles)
        before[1][b, length : length + 3] = new[b, ..., 1, :]
        rows = slice(0, length + 3)
        q = neighbours_turned(qkv(seqlen_q=3)[0][b], *angles)
        mask = diagonals(3, length + 3, right=0)
        expected, expected_lse = exact(q[None], before[0][b, None, rows], before[1][b, None, rows], mask)
        assert (out[b].double() - expected[0]).abs().max() <= ERROR_BF16
        assert (lse[b] - expected_lse[0]).abs().max() < 1e-4
    assert torch.equal(caches[0], before[0]) and torch.equal(caches[1], before[1])
    assert all(x._version > 0 for x in caches)


def neighbours_turned(x, cos, sin):
    """Pairs (2i, 2i + 1) of the first elements."""
    wide = x.double().clone()
    a, b = wide[..., 0:32:2].clone(), wide[..., 1:32:2].clone()
    wide[..., 0:32:2], wide[..., 1:32:2] = a * cos - b * sin, a * sin + b * cos
    return wide.to(x.dtype)


def test_rows_for_sequences_without_queries(fake_device):
    """The cache is updated where there is nothing to attend."""
    cache, rows = torch.zeros(2, 8, 2, 64, dtype=BF16), rand(3, 2, 64)
    offsets = {"cu_seqlens_q": ints(0, 0, 0), "cu_seqlens_k_new": ints(0, 1, 3), "cache_seqlens": ints(2, 4)}
    out = flash_attn_with_kvcache(rand(0, 4, 64), cache, cache.clone(), rows, rows, **offsets)
    assert out.shape == (0, 4, 64) and torch.equal(cache[0, 2], rows[0]) and torch.equal(cache[1, 4:6], rows[1:])


def test_a_plan_of_an_update_is_used_again(fake_device):
    """Not for another layout of the rows or the tables."""
    for rows in (160, 200):
        for _ in range(2):
            append(**rotary(rows=rows))
    append()
    from fa3_cute.torch import device

    assert len(fake_device.calls) == 5 and len(device._thread.plans) == 3
    assert [call.rotary_positions for call in fake_device.calls] == [160, 160, 200, 200, 0]
    assert all(call.workspace and call.k_new_row_stride == 256 for call in fake_device.calls)


# ---- what is refused -------------------------------------------------------------------------------------------------

q, k, v = qkv()
used = ints(5, 9)


def transposed(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


REFUSED = [
    (lambda: flash_attn_func(q, k, v, qv=q), Status.INVALID_ARGUMENT, "qv: must be None with 64 columns of q and 64"),
    (lambda: flash_attn_func(q.float(), k.float(), v.float()), Status.INVALID_ARGUMENT, "float32"),
    (lambda: flash_attn_func(q, k, v.half()), Status.INVALID_ARGUMENT, "float16"),
    (lambda: flash_attn_func(q, k, v[:, :30]), Status.INVALID_SHAPE, "v.shape=(2, 30, 2, 64)"),
    (lambda: flash_attn_func(q[0], k, v), Status.INVALID_SHAPE, "q.shape=(24, 4, 64)"),
    (lambda: flash_attn_func(q[:, :, :3], k, v), Status.INVALID_HEADS, "num_heads"),
    (lambda: flash_attn_func(q, k, v, num_splits=500), Status.SPLIT_KV_UNSUPPORTED, "num_splits=500"),
    (lambda: flash_attn_func(q, k, v, num_splits=[1]), Status.INVALID_ARGUMENT, "num_splits"),
    (lambda: flash_attn_func(q, k, v, softcap=-1.0), Status.SOFTCAP_UNSUPPORTED, "softcap=-1.0"),
    (lambda: flash_attn_func(q, k, v, window_size=3), Status.INVALID_ARGUMENT, "window_size=3"),
    (lambda: flash_attn_func(q, k, v, softmax_scale=math.nan), Status.INVALID_ARGUMENT, "softmax_scale=nan"),
    (lambda: flash_attn_func(q, k, v, q_descale=torch.ones(2, 4)), Status.INVALID_ARGUMENT, "q_descale"),
    (lambda: flash_attn_func(q, k, v, s_aux=torch.ones(3)), Status.INVALID_SHAPE, "s_aux"),
    (lambda: flash_attn_varlen_func(q[0], k[0], v[0], ints(0, 24).long(), ints(0, 40), 24, 40), -9, "cu_seqlens_q"),
    (lambda: flash_attn_varlen_func(q[0], k[0], v[0], ints(0, 24), ints(0, 9, 40), 24, 40), -7, "cu_seqlens_k"),
    (lambda: flash_attn_varlen_func(*packed(), 33, 49, seqused_q=ints(1)), Status.INVALID_SHAPE, "seqused_q"),
    (lambda: flash_attn_with_kvcache(q, k, v, qv=v), Status.INVALID_ARGUMENT, "qv: must be None with 64 columns of q"),
    (lambda: flash_attn_with_kvcache(q, k, v, cache_leftpad=ints(1)), Status.INVALID_SHAPE, "leftpad_k.shape"),
    (lambda: flash_attn_with_kvcache(q, k, v, k=k, cache_seqlens=used), Status.INVALID_ARGUMENT, "v=None"),
    (lambda: flash_attn_with_kvcache(q, k, v, v=k, cache_seqlens=used), Status.INVALID_ARGUMENT, "k=None"),
    (lambda: flash_attn_with_kvcache(q, k, v, k, k), Status.INVALID_ARGUMENT, "cache_seqlens=None"),
    (lambda: flash_attn_with_kvcache(q, k, v, q, q, cache_seqlens=used), Status.INVALID_SHAPE, "k_new.shape"),
    (
        lambda: flash_attn_with_kvcache(q, k, v, k.half(), k, cache_seqlens=used),
        Status.INVALID_ARGUMENT,
        "k_new is float16",
    ),
    (lambda: flash_attn_with_kvcache(q, k, v, rotary_cos=q[0, :, 0, :16]), Status.ROTARY_UNSUPPORTED, "rotary_sin"),
    (lambda: flash_attn_with_kvcache(q, k, v, **rotary(rows=9) | {"rotary_interleaved": 3}), -15, "rotary_interleaved"),
    (lambda: flash_attn_with_kvcache(q, k, v, rotary_seqlens=used), Status.ROTARY_UNSUPPORTED, "seqlens_rotary"),
    (lambda: flash_attn_with_kvcache(q, k, v, cu_seqlens_k_new=ints(0, 1, 2)), Status.INVALID_ARGUMENT, "cu_seqlens_k"),
    (
        lambda: flash_attn_with_kvcache(q, transposed(k), v, k, k, cache_seqlens=used),
        Status.INVALID_SHAPE,
        "contiguous",
    ),
    (lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=41), Status.INVALID_SHAPE, "cache_seqlens=41"),
    (
        lambda: flash_attn_with_kvcache(q, k, v, page_table=ints(0, 1)[:, None]),
        Status.PAGED_KV_UNSUPPORTED,
        "seqused_k",
    ),
]


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused_by_name(number, where, request):
    """The same on a device as on the CPU; nothing runs."""
    fake = request.getfixturevalue("fake_device") if where == "device" else None
    call, status, words = REFUSED[number]
    with pytest.raises(FlashAttentionError) as raised:
        call()
    assert raised.value.code == status and words in raised.value.detail
    assert fake is None or not fake.calls


def test_no_tensors(fake_device):
    with pytest.raises(TypeError, match="q, k and v must be torch tensors, not list"):
        flash_attn_func([1.0], k, v)
    with pytest.raises(TypeError, match="cu_seqlens_q must be a torch tensor, not list"):
        flash_attn_varlen_func(*packed()[:3], [0, 17, 17, 50], packed()[4], 33, 49)


def test_fp8_descales_are_by_kv_head(fake_device):
    tensors = [x.to(FP8) for x in qkv(dtype=torch.float32)]
    flash_attn_func(*tensors, q_descale=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    params = fake_device.calls[-1]
    assert (params.q_descale_batch_stride, params.q_descale_head_stride) == (4, 1)


def test_fp8_cache_of_16_bit_queries():
    """With descales of each sequence and KV head; there is no gradient of it."""
    q, k, v = qkv()
    keys, values = k.to(FP8), v.to(FP8)
    descale = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    out = flash_attn_with_kvcache(q, keys, values, causal=True, k_descale=descale, v_descale=descale)
    factor = descale[:, None, :, None].double()
    expected, _ = exact(q, keys.double() * factor, values.double() * factor, diagonals(24, 40, right=0))
    assert out.dtype == BF16 and (out.double() - expected).abs().max() <= 2 * ERROR_BF16
    new = k[:, :2] / 512  # quantised by the call, of which what was written is what it should be
    flash_attn_with_kvcache(
        q, keys, values, new, new, cache_seqlens=ints(5, 9), causal=True, k_descale=descale, v_descale=descale
    )
    assert torch.equal(values[1, 9:11], (new[1] / descale[1, :, None]).to(FP8))
    with pytest.raises(FlashAttentionError, match="k is torch.float8_e4m3fn: must be torch.bfloat16, as q is"):
        flash_attn_func(q.requires_grad_(), keys, values)
    with pytest.raises(FlashAttentionError, match="softcap=1.0: must be None or 0 with kv_dtype=FP8_E4M3"):
        flash_attn_with_kvcache(q.detach(), keys, values, softcap=1.0)


# ---- a given out -----------------------------------------------------------------------------------------------------


def over_a_cache(**options):
    q, k, v = qkv()
    return flash_attn_with_kvcache(q, k, v, cache_seqlens=ints(9, 40), causal=True, **options)


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_given_out_is_written(where, request):
    """Of any strides; its neighbours stay, and autograd is told."""
    if where == "device":
        request.getfixturevalue("fake_device")
    expected, lse = over_a_cache(return_softmax_lse=True)
    room = torch.full((2, 24, 4, 2 * 64), 7.0, dtype=BF16)
    out = room[..., :64]
    version = out._version
    found, found_lse = over_a_cache(out=out, return_softmax_lse=True)
    assert found is out and torch.equal(out, expected) and torch.equal(found_lse, lse)
    assert (room[..., 64:] == 7).all() and out._version > version
    assert torch.equal(over_a_cache(out=torch.empty_like(expected)), expected)


def test_a_given_out_that_does_not_fit(fake_device):
    """Nor one that would have fitted the call before."""
    over_a_cache(out=torch.empty(2, 24, 4, 64, dtype=BF16))
    for shape, dtype, words in (
        ((2, 23, 4, 64), BF16, "out.shape"),
        ((1, 24, 4, 64), BF16, "out.shape"),
        ((2, 24, 4, 64), torch.float16, "out is float16"),
    ):
        with pytest.raises(FlashAttentionError, match=words):
            over_a_cache(out=torch.empty(shape, dtype=dtype))
    with pytest.raises(TypeError, match="out and q must be torch tensors, not list"):
        over_a_cache(out=[])


def test_a_given_out_has_no_gradient_and_is_not_compiled():
    q, k, v = qkv()
    out = torch.empty_like(q)
    with pytest.raises(UnsupportedFeatureError, match="out: must be None where a gradient"):
        flash_attn_with_kvcache(q.requires_grad_(), k, v, out=out)
    compiled = torch.compile(lambda q: flash_attn_with_kvcache(q, k, v, out=out), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="out: must be None in a compiled function"):
        compiled(q.detach())
