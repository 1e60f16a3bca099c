"""Watch a model of transformers: exact counts while it generates, and an alert when one of its routers breaks.

Run it with `python examples/watch_transformers.py`, after `pip install 'equipoise[hf]'`. It builds a tiny OLMoE with
random weights, downloads nothing, and checks what it prints.
"""

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import equipoise as eq

E, K, B, S = 8, 2, 16, 32  # experts, experts per token, sequences, tokens of each


def tiny_olmoe() -> OlmoeForCausalLM:
    """Two layers; any model of transformers with experts will do, from `from_pretrained` as well."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = OlmoeConfig(
        **sizes, num_attention_heads=4, num_experts=E, num_experts_per_tok=K, pad_token_id=0, eos_token_id=None
    )
    model = OlmoeForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()[:, 0] = 1.0  # a part in common, as hidden states have after training
    return model


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask: half of the prompts are shorter, with padding at the left."""
    tokens, mask = torch.randint(1, 100, (B, S)), torch.ones(B, S, dtype=torch.int64)
    tokens[::2, : S // 4] = mask[::2, : S // 4] = 0
    return tokens, mask


def break_router(model: OlmoeForCausalLM, layer: int) -> None:
    """Let two experts answer to what all tokens have in common, and to nothing else."""
    with torch.no_grad():
        gate = model.model.layers[layer].mlp.gate.weight
        gate[3, 0], gate[5, 0] = 20.0, 10.0


if __name__ == "__main__":
    model = tiny_olmoe()
    tokens, mask = prompts()
    unwatched = model(tokens, attention_mask=mask).logits
    fired = []
    with eq.watch(model, every=1) as eye:
        watched = model(tokens, attention_mask=mask).logits
        eye.step(1)
        for step in range(2, 6):
            if step == 3:
                break_router(model, layer=1)
            model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
            fired += eye.step(step)  # in a server: every so many requests
            for stats in eye.stats():
                loads = (100 * stats.load_E).astype(int).tolist()
                print(f"step {step}, {stats.layer}: {stats.num_tokens} tokens, load {loads} where 100 is fair")
    for alert in fired:
        print(f"{alert.state} at step {alert.step}: {alert.finding.message}")

    real = int(mask.sum()) + 7 * B  # the prompts without padding, and what was generated, but for the last token
    assert all(stats.num_tokens == real and stats.counts_E.sum() == real * K for stats in eye.stats())
    assert [(alert.key, alert.state) for alert in fired] == [("model.layers.1.mlp:collapse", "firing")]
    assert torch.equal(watched, unwatched)  # bit-identical with and without the monitor
    assert not any(module._forward_pre_hooks for module in model.modules())  # and nothing is left of it
