"""Models of transformers with random weights, small, of which attention decides the logits. Imported by tests."""

import torch
import transformers

import fa3_cute.huggingface

SIZES = {
    "vocab_size": 99,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# All experts see all tokens: which are chosen is no matter of a rounding error.
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2, "experts_implementation": "eager"}
# Q and K of 192 columns, V of 128, which its decoded keys have; without experts.
DEEPSEEK = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
}
DECODERS = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 2.0},
    "GptOss": {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | EXPERTS,
    "Phi3": {"head_dim": 96},
    "Phi3-80": {"head_dim": 80},  # no multiple of 32, as few models have it
    "DeepseekV2": DEEPSEEK,
    "DeepseekV3": DEEPSEEK,
}


def decoder(kind, **options):
    """In BF16, ready to infer. What follows a dash in its kind is of the sizes alone."""
    fa3_cute.huggingface.register()
    name, _, _ = kind.partition("-")
    config = getattr(transformers, f"{name}Config")(**SIZES | DECODERS.get(kind, {}) | options)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).eval()


def using(model, implementation, dtype=torch.bfloat16):
    """The same model, with weights rounded to BF16 in this type."""
    model.set_attn_implementation(implementation)
    return model.to(dtype)


def tokens(batch=2, length=24, device="cpu"):
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def padding(side, ids):
    """attention_mask; the first sequence is 7 tokens shorter."""
    mask = torch.ones_like(ids)
    if side:
        mask[0, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    return mask


def three(run, model):
    """What run(model) gives: eager in FP32, eager in BF16, and ours in BF16."""
    exact = run(using(model, "eager", torch.float32))
    return exact.float(), run(using(model, "eager")).float(), run(using(model, "fa3_cute")).float()


def error(found, exact):
    """Root mean square, relative."""
    return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()


def greedy(model, ids, mask, new=6, **options):
    """The tokens that ours generates, and by how much each is below the best of FP32's logits."""
    with torch.no_grad():
        options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new} | options
        whole = using(model, "fa3_cute").generate(ids, attention_mask=mask, **options)
        longer = torch.cat((mask, mask.new_ones(ids.shape[0], new)), 1)
        positions = (longer.cumsum(-1) - 1).clamp(min=0)
        exact = using(model, "eager", torch.float32)(whole, attention_mask=longer, position_ids=positions).logits
    chosen, logits = whole[:, ids.shape[1] :], exact[:, ids.shape[1] - 1 : -1]
    return chosen, (logits.amax(-1) - logits.gather(-1, chosen[..., None])[..., 0]).max().item()
