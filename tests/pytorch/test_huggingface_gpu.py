"""Models of transformers on a GPU with this library's attention: against eager attention in float32."""

import pytest

pytest.importorskip("transformers", reason="fa3_cute.huggingface needs transformers")

import torch
from tiny_models import decoder, error, greedy, padding, three, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch has no CUDA, or there is no GPU"),
]
MORE = 1.5  # than eager BF16's own error


ALL = [(kind, side) for kind in ("Mistral", "Gemma2", "GptOss") for side in ("", "left")]
ALL += [("Llama", "left"), ("Qwen3", ""), ("Phi3", "left"), ("DeepseekV2", "left"), ("DeepseekV3", "left")]


def named(kind: str, side: str) -> str:
    return f"{kind}, padded on the {side}" if side else kind


@pytest.mark.parametrize("kind, side", ALL)
def test_logits(kind, side, compare_errors):
    ids = tokens(device="cuda")
    mask = padding(side, ids)

    def run(model):
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits[mask.bool()]

    exact, eager, ours = three(run, decoder(kind).cuda())
    found, others = error(ours, exact), error(eager, exact)
    compare_errors(f"logits of {named(kind, side)}", found, others)
    assert found <= MORE * others


GREEDY = [("Mistral", ""), ("Mistral", "left"), ("Llama", ""), ("Phi3", "left"), ("DeepseekV3", "left")]


@pytest.mark.parametrize("kind, side", GREEDY)
def test_greedy_tokens(kind, side):
    """Each token is the best in float32, or as good within an error."""
    ids = tokens(device="cuda")
    chosen, worse = greedy(decoder(kind).cuda(), ids, padding(side, ids))
    assert chosen.shape == (2, 6) and worse < 0.1


TRAINED = [("Mistral", ""), ("Mistral", "left"), ("Gemma2", ""), ("GptOss", "left")]
TRAINED += [("Llama", "left"), ("Qwen3", ""), ("Phi3", "left"), ("DeepseekV3", "")]


@pytest.mark.parametrize("kind, side", TRAINED)
def test_a_training_step(kind, side, compare_errors):
    """Gradients of all weights; a batch with padding has none that are not numbers."""
    ids = tokens(device="cuda")
    mask = padding(side, ids)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)

    def run(model):
        model.zero_grad()
        model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters()])

    exact, eager, ours = three(run, decoder(kind).cuda())
    found, others = error(ours, exact), error(eager, exact)
    compare_errors(f"gradients of {named(kind, side)}", found, others)
    assert not ours.isnan().any() and found <= MORE * others
