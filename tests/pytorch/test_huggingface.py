"""Models of transformers with this library's attention, on the CPU: against eager attention in float32."""

import pytest

pytest.importorskip("transformers", reason="fa3_cute.huggingface needs transformers")

import torch
import transformers
from tiny_models import DECODERS, SIZES, decoder, error, greedy, padding, three, tokens, using

import fa3_cute.huggingface as adapter
from fa3_cute.contract.status import FlashAttentionError, UnsupportedFeatureError

MORE = 1.2  # than eager BF16's own error


def logits_of(ids, mask, **options):
    def run(model):
        with torch.no_grad():
            return model(ids, attention_mask=mask, **options).logits[mask.bool()]

    return run


@pytest.mark.parametrize("side", ["", "left", "right"])
@pytest.mark.parametrize("kind", DECODERS)
def test_logits(kind, side):
    """Within what BF16 costs in eager attention, of every token that is one."""
    ids = tokens()
    exact, eager, ours = three(logits_of(ids, padding(side, ids)), decoder(kind))
    assert error(ours, exact) <= MORE * error(eager, exact)


@pytest.mark.parametrize(
    "kind, off",
    [
        ("Mistral", {"sliding_window": None}),
        ("Gemma2", {"attn_logit_softcapping": None}),
        ("Llama", {"attention_mask": None}),
        ("GptOss", {"sinks": None}),
    ],
)
def test_these_models_would_show_it(kind, off):
    """What is served has weight in them: without it logits are elsewhere."""
    ids = tokens()
    mask = padding("left", ids)
    model = using(decoder(kind), "fa3_cute")
    ours = logits_of(ids, mask)(model)
    for name, value in off.items():
        if name == "attention_mask":
            with torch.no_grad():
                assert error(model(ids).logits[mask.bool()].float(), ours.float()) > 0.05
        elif name == "sinks":
            for layer in model.model.layers:
                layer.self_attn.sinks.data.fill_(-50.0)
            assert error(logits_of(ids, mask)(model).float(), ours.float()) > 0.05
        else:
            other = using(decoder(kind, **{name: value}), "fa3_cute")
            assert error(logits_of(ids, mask)(other).float(), ours.float()) > 0.05


COMPILED = transformers.CompileConfig(backend="aot_eager", mode=None)
COMPILED._compile_all_devices = True
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static", "compile_config": COMPILED},
}


GREEDY = [
    *((kind, side, cache) for kind in ("Gemma2", "GptOss") for side in ("", "left") for cache in ("dynamic", "static")),
    *((kind, "left", "dynamic") for kind in ("Qwen3", "Phi3", "DeepseekV2", "DeepseekV3")),
    *(("Llama", side, "compiled") for side in ("", "left")),
]


@pytest.mark.parametrize("kind, side, cache", GREEDY)
def test_greedy_tokens(kind, side, cache):
    """Over a cache, a growing one or one with room: each token is the best in float32, or as good within an error."""
    ids, options = tokens(), CACHES[cache]
    chosen, worse = greedy(decoder(kind), ids, padding(side, ids), **options)
    assert chosen.shape == (2, 6) and worse < 0.05


def test_several_queries_over_a_cache():
    """A prompt in two parts is the prompt, padded or not."""
    ids, model = tokens(), using(decoder("Mistral"), "fa3_cute")
    for side in ("", "left"):
        mask = padding(side, ids)
        with torch.no_grad():
            whole = model(ids, attention_mask=mask).logits[:, 15:]
            cache = model(ids[:, :15], attention_mask=mask[:, :15], use_cache=True).past_key_values
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, 15:]
            rest = model(ids[:, 15:], attention_mask=mask, past_key_values=cache, position_ids=positions).logits
        if side:  # the first part began at another position
            assert rest.shape == whole.shape and not rest.isnan().any()
        else:
            assert error(rest.float(), whole.float()) < 0.02


def test_a_static_cache_without_a_mask():
    """Its rows that nothing has written are not attended."""
    ids, model = tokens(), using(decoder("Llama"), "fa3_cute")
    with torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        found = model(ids, past_key_values=cache).logits
        assert error(found.float(), model(ids).logits.float()) < 0.01


@pytest.mark.parametrize("side", ["", "left", "right"])
@pytest.mark.parametrize("kind", ["Mistral", "GptOss"])
def test_as_params_of_a_device(kind, side, fake_device, monkeypatch):
    """The same as on the CPU, where queries that are of no sequence are 0, whatever memory held."""
    ids, model = tokens(), using(decoder(kind), "fa3_cute")
    mask = padding(side, ids)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    with torch.no_grad():
        all_rows = model(ids, attention_mask=mask).logits
    assert not all_rows.isnan().any()
    found = all_rows[mask.bool()]
    assert len(fake_device.calls) == 2 and all(bool(call.seqused_k) == bool(side) for call in fake_device.calls)
    monkeypatch.undo()
    assert error(found.float(), logits_of(ids, mask)(model).float()) < 0.01


@pytest.mark.parametrize("kind, dims", [("DeepseekV3", (192, 128)), ("Phi3-80", (80, 0))])
def test_columns_are_as_they_are(kind, dims, fake_device):
    """A device is given them so, with gradients and without."""
    model, ids = using(decoder(kind), "fa3_cute"), tokens()
    with torch.no_grad():
        model(ids)
    model(ids).logits.sum().backward()
    found = [(call.head_dim, call.head_dim_v) for call in fake_device.calls]
    assert found == [dims] * 6, "of two layers: forward; forward and backward"


def test_a_cache_with_room_is_not_copied(fake_device):
    """Where nothing is padded, keys are those of the cache itself, as far as it is written."""
    ids, model = tokens(), using(decoder("Llama", num_hidden_layers=1), "fa3_cute")
    with torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        model(ids, past_key_values=cache, attention_mask=padding("", ids))
    (call,) = fake_device.calls
    assert (call.k, call.seqlen_k, call.seqused_k) == (cache.layers[0].keys.data_ptr(), 24, None)


# ---- sequences in a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["positions", "offsets"])
def test_packed_sequences(how):
    """Two sequences in one row see nothing of one another."""
    ids, model = tokens(1, 24), using(decoder("Mistral"), "fa3_cute")
    parts = ids[:, :9], ids[:, 9:]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    options = {}
    if how == "offsets":
        offsets = torch.tensor([0, 9, 24], dtype=torch.int32)
        options = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 15, "max_length_k": 15}
    with torch.no_grad():
        found = model(ids, position_ids=positions, use_cache=False, **options).logits
        expected = torch.cat([model(part).logits for part in parts], 1)
    assert error(found.float(), expected.float()) < 0.01


# ---- models that are no decoders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["", "right"])
def test_an_encoder(side):
    adapter.register()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "initializer_range")
    torch.manual_seed(0)
    config = transformers.BertConfig(num_attention_heads=2, **{name: SIZES[name] for name in names})
    model = transformers.BertModel(config).to(torch.bfloat16).eval()
    ids = tokens()
    mask = padding(side, ids)

    def run(model):
        with torch.no_grad():
            return model(ids, attention_mask=mask).last_hidden_state[mask.bool()]

    exact, eager, ours = three(run, model)
    assert error(ours, exact) <= MORE * error(eager, exact)


def test_an_encoder_and_a_decoder():
    """Whose queries look at the keys of a padded encoder."""
    adapter.register()
    torch.manual_seed(0)
    layers = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 96))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=99, d_model=128, init_std=0.1, **layers, **heads)
    model = transformers.BartModel(config).to(torch.bfloat16).eval()
    ids = tokens()
    mask = padding("right", ids)

    def run(model):
        with torch.no_grad():
            return model(ids, attention_mask=mask, decoder_input_ids=ids[:, :11]).last_hidden_state

    exact, eager, ours = three(run, model)
    assert error(ours, exact) <= MORE * error(eager, exact)


# ---- training --------------------------------------------------------------------------------------------------------


def gradients_of(ids, mask):
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)  # nor what a token of padding predicts

    def run(model):
        model.zero_grad()
        model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters()])

    return run


@pytest.mark.parametrize("side", ["", "left", "right"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral", "Gemma2", "GptOss", "Phi3", "Phi3-80", "DeepseekV3"])
def test_gradients(kind, side):
    ids = tokens()
    exact, eager, ours = three(gradients_of(ids, padding(side, ids)), decoder(kind))
    assert error(ours, exact) <= MORE * error(eager, exact)


@pytest.mark.parametrize("alone", [False, True], ids=["", "alone"])
def test_sinks_are_trained(alone):
    """Among all weights they are few: their gradients by themselves."""
    ids, model = tokens(), decoder("GptOss")
    sinks = {name: x for name, x in model.named_parameters() if "sinks" in name}
    if alone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in sinks)

    def run(model):
        model.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        return torch.cat([x.grad.flatten().float() for x in sinks.values()])

    exact, eager, ours = three(run, model)
    assert exact.all() and error(ours, exact) <= MORE * error(eager, exact)


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["", "left"])
def test_compiled(side):
    ids, model = tokens(), using(decoder("Mistral"), "fa3_cute")
    mask = padding(side, ids) if side else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, expected = (call(ids, attention_mask=mask, use_cache=False).logits for call in (compiled, model))
    assert torch.equal(found, expected)


# ---- what is refused -------------------------------------------------------------------------------------------------


def holes(ids):
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    return mask


REFUSED = {
    "dropout=0.5": lambda ids: using(decoder("Llama", attention_dropout=0.5), "fa3_cute").train()(ids),
    "attention_mask with padding between": lambda ids: using(decoder("Llama"), "fa3_cute")(
        ids, attention_mask=holes(ids)
    ),
    "attention_mask of 4 dimensions": lambda ids: using(decoder("Llama"), "fa3_cute")(
        ids, attention_mask=torch.ones(2, 1, 24, 24, dtype=torch.bool)
    ),
    "output_attentions": lambda ids: adapter.attention_forward(
        torch.nn.Module(), *(torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16),) * 3, None, output_attentions=True
    ),
    "the mask chunked_overlay": lambda ids: adapter.padding_mask(
        2, 24, 24, mask_function=transformers.masking_utils.chunked_causal_mask_function(8, torch.zeros(2))
    ),
    "the mask or_masks": lambda ids: adapter.padding_mask(
        2, 24, 24, mask_function=transformers.masking_utils.or_masks(adapter.padding_mask)
    ),
    "a mask function of the model's own": lambda ids: adapter.padding_mask(2, 24, 24, use_vmap=True),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(words):
    with torch.no_grad(), pytest.raises(UnsupportedFeatureError, match=words):
        REFUSED[words](tokens())


def test_float32_is_refused():
    with torch.no_grad(), pytest.raises(FlashAttentionError, match="float32"):
        using(decoder("Llama"), "fa3_cute", torch.float32)(tokens())


def test_float32_under_autocast_is_cast():
    model, ids = using(decoder("Llama"), "fa3_cute", torch.float32), tokens()
    with torch.no_grad():
        exact = using(model, "eager", torch.float32)(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = using(model, "fa3_cute", torch.float32)(ids).logits
    assert error(found.float(), exact) < 0.1


def test_a_name_with_flash_in_it_is_refused():
    with pytest.raises(FlashAttentionError, match="must not have 'flash' in it"):
        adapter.register("flash_cute")
