"""The operators in torch's compiler, its exporter and its fake tensors; and signatures. No GPU."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensors import BF16, FP8, ints, packed, qkv, qv_tensors, rand, rotary
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fa3_cute.torch as adapter
from fa3_cute.torch import calls, flash_attn_func, flash_attn_varlen_func, merge_attention, ops

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = torch.ops.fa3_cute
# Of FlashAttention-3's flash_attn_interface.py.
SIGNATURES = {
    "flash_attn_func": (
        "q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
        "sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
        "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
        "sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        "max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flash_attns(name):
    """Order and defaults too, but that max_seqlen_* may be left out; what is ours is keyword only."""
    parameters = inspect.signature(getattr(adapter, name)).parameters.values()
    theirs = [str(x) for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
    assert (
        ", ".join(theirs).replace("max_seqlen_q=None, max_seqlen_k=None, s", "max_seqlen_q, max_seqlen_k, s")
        == (SIGNATURES[name])
    )
    own = ["s_aux", "out"] if name == "flash_attn_with_kvcache" else ["s_aux"]
    assert [x.name for x in parameters if x.kind is x.KEYWORD_ONLY] == own


def test_documented_arguments():
    """docs/migration.md has each argument of each function once."""
    text = (ROOT / "docs" / "migration.md").read_text().partition("## From flash-attn in PyTorch")[2]
    table = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.MULTILINE)
    documented = sorted(name for cell in table for name in re.findall(r"`(\w+)`", cell))
    known = {name for function in SIGNATURES for name in inspect.signature(getattr(adapter, function)).parameters}
    assert documented == sorted(known)


def test_documented_snippet_runs():
    text = (ROOT / "docs" / "migration.md").read_text().partition("## From flash-attn in PyTorch")[2]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    names = dict(zip("qkv", qkv(), strict=True))
    exec("\n".join(lines), names)
    assert names["out"].shape == (2, 24, 4, 64) and names["lse"].shape == (2, 4, 24)


def test_schema_is_the_call():
    for name, kind in (("forward", calls.ForwardCall), ("backward", calls.BackwardCall)):
        schema = getattr(OPERATORS, name).default._schema
        assert tuple(argument.name for argument in schema.arguments) == kind._fields
        assert not schema.is_mutable
    schema = OPERATORS.update_forward.default._schema
    assert tuple(x.name for x in schema.arguments) == calls.ForwardCall._fields + calls.Update._fields
    assert [x.name for x in schema.arguments if x.alias_info and x.alias_info.is_write] == ["k", "v"]


ALL_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def forward_calls():
    q, k, v, cu_q, cu_k = packed()
    dense, scales = qkv(), torch.ones(2, 4)
    yield "dense", (*dense,), {"is_causal": True, "softmax_scale": 0.25}
    yield "packed", (q, k, v, cu_q, cu_k), {"window_size_left": 9, "window_size_right": 0}
    sinks = torch.ones(4, requires_grad=True)
    yield "scores", (*dense,), {"s_aux": sinks, "softcap": 2.0, "attention_chunk": 16}
    *parts, second = qv_tensors()
    yield "qv", tuple(parts), {"q_v": second, "is_causal": True}
    yield "fp8", tuple(x.to(FP8) for x in dense), {"q_descale": scales, "s_aux": torch.zeros(4)}


@pytest.mark.parametrize("name, args, options", forward_calls())
def test_opcheck_of_forward(name, args, options):
    grad = name in ("dense", "scores")
    args = tuple(x.clone().requires_grad_() if grad and x.is_floating_point() else x for x in args)
    # The check of the schema multiplies, which FP8 of the CPU cannot.
    tests = ("test_faketensor",) if name == "fp8" else ALL_TESTS
    found = torch.library.opcheck(OPERATORS.forward.default, args, options, test_utils=tests)
    assert set(found) == set(tests) and set(found.values()) == {"SUCCESS"}


def test_opcheck_of_backward_and_merge():
    q, k, v = qkv()
    out, lse = flash_attn_func(q, k, v, return_attn_probs=True)
    tests = ("test_schema", "test_faketensor")
    arguments = rand(*q.shape), q, k, v, out, lse, 2 * lse
    for options in ({}, {"s_aux": torch.ones(4, dtype=BF16), "softcap": 2.0, "attention_chunk": 16}):
        torch.library.opcheck(OPERATORS.backward.default, arguments, options, test_utils=tests)
    torch.library.opcheck(OPERATORS.merge_attention.default, (out, lse, out, lse))


def test_opcheck_of_update_forward():
    q, *_ = qkv(seqlen_q=3)
    caches = [rand(2, 50, 2, 64, seed=seed) for seed in (1, 2)]
    rows = [rand(2, 3, 2, 64, seed=seed) for seed in (3, 4)]
    options = {"seqused_k": ints(9, 20), "is_causal": True, "k_new": rows[0], "v_new": rows[1], **rotary()}
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPERATORS.update_forward.default, (q, *caches), options, test_utils=tests)


def test_compiled():
    """One graph for all sizes and bounds, without a break."""

    def model(q, k, v, window):
        out, lse = flash_attn_func(q * 2, k, v, window_size=(window, 0), return_attn_probs=True)
        return out + 1, lse

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*qkv(batch=3, seqlen_q=24, seqlen_k=29), 8)  # no size twice: they would be held for one
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, seqlen, window in ((5, 40, 9), (6, 33, 11)):
            arguments = *qkv(batch=batch, seqlen_q=seqlen, seqlen_k=seqlen + 5), window
            for got, expected in zip(compiled(*arguments), model(*arguments), strict=True):
                assert torch.equal(got, expected)


def test_compiled_packed():
    """max_seqlen_q may be what is only known when the graph runs."""

    def model(q, k, v, cu_q, cu_k):
        most = (cu_q[1:] - cu_q[:-1]).max().item()
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, most, causal=True)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*packed()), model(*packed()))


def test_exported():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, cu_q, cu_k):
            return flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True)

    arguments = packed()
    rows = torch.export.Dim("rows", min=2, max=4096)
    shapes = ({0: rows}, None, None, None, None)
    program = torch.export.export(Model(), arguments, dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert OPERATORS.forward.default in targets
    more = (torch.cat([arguments[0], arguments[0][:7]]), *arguments[1:])
    assert torch.equal(program.module()(*more)[:50], Model()(*more)[:50])


def test_fake_tensors_of_a_device():
    """Shapes, dtypes and devices without a GPU, for every operator."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 16, 4, 64, dtype=FP8, device="cuda") for _ in range(3))
        out, lse = flash_attn_func(q, k, v, return_attn_probs=True)
        assert (out.dtype, out.device.type, out.shape) == (BF16, "cuda", q.shape)
        assert (lse.dtype, lse.device.type, lse.shape) == (torch.float32, "cuda", (2, 4, 16))
        merged, _ = merge_attention(out, lse, out, lse)
        assert (merged.dtype, merged.shape) == (BF16, out.shape)
        given = out, *(x.to(BF16) for x in (q, k, v)), out, lse
        for s_aux in (None, torch.empty(4, device="cuda")):
            *grads, d_s_aux = OPERATORS.backward(*given, s_aux=s_aux)
            assert [(x.dtype, x.device.type, x.shape) for x in grads] == [(BF16, "cuda", q.shape)] * 3
            of_sinks = (BF16, (0,)) if s_aux is None else (torch.float32, (4,))
            assert (d_s_aux.dtype, d_s_aux.shape) == of_sinks and d_s_aux.is_cuda
        x = torch.empty(2, 16, 4, 64, dtype=BF16, requires_grad=True)  # autograd of a device asks for its driver
        (grad,) = torch.autograd.grad(flash_attn_func(x, x[:, :, :2], x[:, :, :2]).sum(), x)
        assert grad.shape == x.shape


def test_meta_tensors():
    q = torch.empty(2, 16, 4, 64, dtype=BF16, device="meta")
    assert flash_attn_func(q, q, q).device.type == "meta"


def test_eager_calls_spare_the_dispatcher_where_nobody_watches():
    q = rand(2, 16, 4, 64)
    assert ops.is_plain(q) and ops.is_plain(torch.nn.Parameter(q))
    with FakeTensorMode() as mode:
        assert not ops.is_plain(q) and not ops.is_plain(mode.from_tensor(q))
    assert not ops.is_plain(q.to("meta"))
    seen = []
    torch.func.vmap(lambda x: seen.append(ops.is_plain(x)) or x)(q)
    assert seen == [False]


class Seen(TorchDispatchMode):
    """The operators that run under it."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A tensor without memory, around another one."""

    seen = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return func(*(x.inner if isinstance(x, cls) else x for x in args), **(kwargs or {}))


@pytest.mark.parametrize("wants_grad", [False, True], ids=["", "grad"])
def test_a_mode_sees_the_operators(wants_grad):
    q, k, v = (x.requires_grad_(wants_grad) for x in qkv())
    expected = flash_attn_func(q, k, v)
    with Seen() as seen:
        out = flash_attn_func(q, k, v)
        if wants_grad:
            torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.equal(out, expected)
    assert OPERATORS.forward.default in seen.operators
    assert (OPERATORS.backward.default in seen.operators) == wants_grad


@pytest.mark.parametrize("place", range(3), ids="qkv")
@pytest.mark.parametrize("wants_grad", [False, True], ids=["", "grad"])
def test_a_subclass_sees_the_operator(place, wants_grad):
    """Whichever argument it is."""
    tensors = list(qkv())
    expected = flash_attn_func(*tensors)
    tensors[place] = Wrapped(tensors[place])
    tensors[place - 1].requires_grad_(wants_grad)
    Wrapped.seen.clear()
    assert torch.equal(flash_attn_func(*tensors), expected)
    assert OPERATORS.forward.default in Wrapped.seen


def test_a_tensor_of_a_transform_that_is_over():
    """Its gradient is that of what it stood for."""
    q, k, v = (x.requires_grad_() for x in qkv())
    kept = []
    torch.func.grad(lambda x: kept.append(x) or x.float().sum())(q)
    (stale,) = kept
    found = torch.autograd.grad(flash_attn_func(stale, k, v).sum(), (q, k))
    expected = torch.autograd.grad(flash_attn_func(q, k, v).sum(), (q, k))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_package_does_not_import_torch():
    script = "import sys, fa3_cute, fa3_cute.api; fa3_cute.forward; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_cache_seqlens_of_an_int_is_compiled():
    q, k, v = qkv(seqlen_q=1)

    def decode(length):
        return adapter.flash_attn_with_kvcache(q, k, v, cache_seqlens=length)

    compiled = torch.compile(decode, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (7, 30, 40):
        assert torch.equal(compiled(length), decode(length))
        lengths = ints(length, length)
        assert torch.equal(adapter.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths), decode(length))
