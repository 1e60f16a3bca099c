"""Dense models made sparse: the same function, group by group; and what is drawn anew is what was asked for."""

import json
from dataclasses import replace

import pytest
import torch

from equipoise.convert.fields import ConversionError
from equipoise.convert.read import write_config
from equipoise.convert.upcycle import Upcycling, block_centers, upcycle_run, upcycled_experts, upcycled_router
from equipoise.disk.checkpoint import load_checkpoint, save_checkpoint
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.models.run_files import fill, read_config
from equipoise.models.tokenizer import Tokenizer
from equipoise.train.tokenizer import train_bpe

DENSE = DecoderConfig(
    vocab_size=64, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, hidden_dim=48, max_seq_len=64, init_std=0.2
)


def dense_run(folder, config=DENSE):
    torch.manual_seed(0)
    model = Decoder(config).eval()
    folder.mkdir()
    write_config(folder, config)
    save_checkpoint(folder / "checkpoints", 0, {"model": model.state_dict()}, {})
    return model


def sparse_of(folder):
    model = Decoder(read_config(folder)).eval()
    fill(model, load_checkpoint(folder / "checkpoints" / "step-000000").tensors["model"], folder)
    return model


EXACT = {
    "eight whole copies": Upcycling(),
    "all of them": Upcycling(experts=4, top_k=4),
    "every second layer": Upcycling(experts=4, every=2),
    "shards": Upcycling(experts=4, granularity=8, top_k=8),
    "two of each shard": Upcycling(experts=4, granularity=3, top_k=6),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("style", ["modern", "gpt2"])
def test_the_function_is_kept(name, style, tmp_path):
    options = EXACT[name]
    dense = dense_run(tmp_path / "dense", replace(DENSE, style=style))
    config = upcycle_run(tmp_path / "dense", tmp_path / "sparse", options)
    assert options.keeps_the_function
    sparse = sparse_of(tmp_path / "sparse")
    assert len(sparse.moe_layers) == (1 if options.every == 2 else 3)
    assert config.moe.num_experts * config.moe.hidden_dim == options.experts * 48
    tokens = torch.randint(0, 64, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(sparse(tokens), dense(tokens), rtol=1e-4, atol=1e-4)
    taken = {tuple(sorted(set(ids.tolist()))) for ids in chosen(sparse, tokens)}
    assert len(taken) > 1 or options.top_k == options.experts  # the router decides, though it can't do harm


def chosen(model, tokens):
    """(T, K) of the first MoE layer."""
    found = []
    layer = next(iter(model.moe_layers.values()))
    layer.tap.register_forward_hook(lambda module, args, routed: found.append(routed.decision.expert_ids_N))
    with torch.no_grad():
        model(tokens)
    return found[0].view(-1, layer.k)


def test_one_copy_of_each_shard_per_token(tmp_path):
    dense_run(tmp_path / "dense")
    options = EXACT["two of each shard"]
    upcycle_run(tmp_path / "dense", tmp_path / "sparse", options)
    for ids in chosen(sparse_of(tmp_path / "sparse"), torch.randint(0, 64, (1, 40))).tolist():
        assert sorted(id // options.experts for id in ids) == [0, 0, 1, 1, 2, 2]  # each shard twice
        assert len({id % options.experts for id in ids}) == 2  # the same two copies of each


def test_shards_by_hand():
    # F = 4 in 2 shards of 2, 2 copies each: gates are rows 0-3, ups rows 4-7
    up, down = torch.arange(8.0)[:, None].repeat(1, 3), torch.arange(4.0).repeat(3, 1)
    got_up, got_down = upcycled_experts(up, down, Upcycling(experts=2, granularity=2, top_k=2), torch.Generator())
    assert got_up[:, :, 0].tolist() == [[0, 1, 4, 5], [0, 1, 4, 5], [2, 3, 6, 7], [2, 3, 6, 7]]
    assert got_down[:, 0].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    rows = upcycled_router(3, Upcycling(experts=2, granularity=2, top_k=2), torch.Generator().manual_seed(0))
    assert torch.equal(rows[:2], rows[2:])


def test_published_weights_keep_it_while_the_router_is_undecided(tmp_path):
    dense = dense_run(tmp_path / "dense")
    options = Upcycling(experts=4, top_k=1, weights="published", router_std=1e-6)
    upcycle_run(tmp_path / "dense", tmp_path / "sparse", options)
    up, down = torch.randn(96, 32), torch.randn(32, 48)
    scaled, _ = upcycled_experts(up, down, options, torch.Generator())
    torch.testing.assert_close(scaled[0], up * 4 ** (1 / 3))  # (E G^2 / T)^(1/3), E = 4, G = T = 1
    # gelu-like units are not homogeneous: near, not equal
    tokens = torch.randint(0, 64, (1, 30))
    with torch.no_grad():
        a, b = sparse_of(tmp_path / "sparse")(tokens).flatten(), dense(tokens).flatten()
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9


def test_redrawn_units_are_as_many_and_as_wide():
    up, down = torch.randn(96, 32) * 0.3, torch.randn(32, 48) * 0.7
    options = Upcycling(experts=4, reinit=0.5)
    got_up, got_down = upcycled_experts(up, down, options, torch.Generator().manual_seed(1))
    for expert in range(4):
        changed = (got_up[expert] != up).any(1)
        assert torch.equal(changed[:48], changed[48:])  # a unit's gate and up together
        assert torch.equal(changed[:48], (got_down[expert] != down).any(0))  # and its column
        assert int(changed.sum()) == 48
        assert got_up[expert][changed].std() == pytest.approx(0.3, rel=0.1)
        assert got_down[expert][:, changed[:48]].std() == pytest.approx(0.7, rel=0.1)
    assert not torch.equal(got_up[0], got_up[1])  # each expert others
    assert not options.keeps_the_function


def test_same_seed_same_model(tmp_path):
    dense_run(tmp_path / "dense")
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        upcycle_run(tmp_path / "dense", tmp_path / name, Upcycling(seed=seed, noise=0.01))
    one, same, other = (sparse_of(tmp_path / name).state_dict() for name in ("one", "same", "other"))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["layers.0.mlp.router.weight"], other["layers.0.mlp.router.weight"])
    assert not torch.equal(one["layers.0.mlp.experts.down_proj"][0], one["layers.0.mlp.experts.down_proj"][1])


def test_it_trains_and_the_copies_part(tmp_path):
    dense_run(tmp_path / "dense")
    upcycle_run(tmp_path / "dense", tmp_path / "sparse", Upcycling(experts=4))
    model = sparse_of(tmp_path / "sparse").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 64, (4, 33))
    for _ in range(3):
        cross_entropy_sum(model(tokens[:, :-1]), tokens[:, 1:])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    experts = model.layers[0].mlp.experts.down_proj
    assert not torch.equal(experts[0], experts[1])


def test_the_tokenizer_goes_along(tmp_path):
    dense_run(tmp_path / "dense")
    tokenizer = train_bpe(["some text to learn from, again and again " * 20], 300)
    tokenizer.save(tmp_path / "dense")
    upcycle_run(tmp_path / "dense", tmp_path / "sparse", Upcycling())
    assert Tokenizer.load(tmp_path / "sparse").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": 3, "top_k": 4}, "top_k: expected a multiple of granularity=3"),
        ({"experts": 2, "top_k": 3}, "at most the 2 experts, got 3"),
        ({"top_k": 1}, "expected 2 or more with weights='exact'"),
        ({"experts": 0}, "experts: expected at least 1"),
        ({"reinit": 1.0}, "expected reinit in"),
        ({"every": 4}, "every: expected at most num_layers=3"),
        ({"granularity": 5, "top_k": 5}, "granularity: expected a divisor of hidden_dim=48, got 5"),
    ],
)
def test_refuses(options, message, tmp_path):
    dense_run(tmp_path / "dense")
    with pytest.raises(ConversionError, match=message):
        upcycle_run(tmp_path / "dense", tmp_path / "sparse", Upcycling(**options))
    assert not (tmp_path / "sparse").exists()


def test_refuses_what_is_sparse_already(tmp_path):
    dense_run(tmp_path / "dense")
    upcycle_run(tmp_path / "dense", tmp_path / "sparse", Upcycling())
    with pytest.raises(ConversionError, match="expected a dense model"):
        upcycle_run(tmp_path / "sparse", tmp_path / "again", Upcycling())
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["model"]["moe"]["num_experts"] == 8


def test_routers_do_not_follow_what_all_tokens_share(tmp_path):
    dense = dense_run(tmp_path / "dense")
    with torch.no_grad():  # a common part twice as long as what differs
        dense.embed_tokens.weight += 3 * dense.embed_tokens.weight.std() * torch.randn(32)
    save_checkpoint(tmp_path / "dense" / "checkpoints", 1, {"model": dense.state_dict()}, {})
    tokens = torch.randint(0, 64, (8, 60))
    centers = block_centers(dense, tokens)
    assert sorted(centers) == [0, 1, 2]

    def busiest(name, **options):
        upcycle_run(tmp_path / "dense", tmp_path / name, Upcycling(), **options)
        ids = chosen(sparse_of(tmp_path / name), torch.randint(0, 64, (8, 60)))
        return float(ids.flatten().bincount(minlength=8).max() / len(ids))

    plain, centered = busiest("plain"), busiest("centered", centers=centers)
    assert centered < 0.6 < plain
    rows = sparse_of(tmp_path / "centered").layers[0].mlp.router.weight
    assert (rows @ centers[0]).abs().max() < 1e-5
