"""The command on a run that was trained: what it counts is what the model does, whole files, errors."""

import json

import numpy as np
import pytest
import torch

from equipoise.cli import main
from equipoise.disk.checkpoint import list_checkpoints, load_checkpoint
from equipoise.models.run_files import HELD_OUT, MODEL, fill, load
from equipoise.monitor.specialisation import DOMAIN, FILE_NAME, Roles, read_roles
from equipoise.train.report import Silent
from equipoise.train.run import train
from equipoise.train.specialise import specialise, stream_of_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_config):
    out = tmp_path_factory.mktemp("specialise") / "run"
    train(make_config(), out, Silent())
    return out


@torch.no_grad()
def choices(model, rows_BS):
    """(tokens, K) by layer: what each layer's router decides, noted at its own output."""
    seen = {name: [] for name in model.moe_layers}
    handles = [
        layer.router.register_forward_hook(lambda m, a, d, name=name: seen[name].append(d.expert_ids_N.view(-1, 2)))
        for name, layer in model.moe_layers.items()
    ]
    model(rows_BS)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in seen.items()}


def test_it_counts_what_the_model_does(run):
    """On the kept tokens, all in one batch, against the routers' own output and set arithmetic."""
    config = run / "config.json"
    kept = config.read_text()
    record = json.loads(kept)
    record["data"]["corpus"] = "gone.jsonl"  # so that it takes the tokens that are kept
    config.write_text(json.dumps(record))
    try:
        roles = specialise(run, num_tokens=100_000)
        loaded = load(run)
    finally:
        config.write_text(kept)
    rows_BS = loaded.held_out_BS[:, :-1]
    assert roles.num_tokens == rows_BS.numel()
    assert roles.window == 32
    assert [DOMAIN in layer.splits for layer in roles.layers] == [False, False]
    assert "domains are not known" in roles.notes[0]
    late = choices(loaded.model, rows_BS)
    for layer in roles.layers:
        assert list(layer.load) == np.bincount(late[layer.layer].reshape(-1), minlength=8).tolist()
    first = list_checkpoints(run / "checkpoints")[0]
    fill(loaded.model, load_checkpoint(first).tensors[MODEL], first)
    early = choices(loaded.model, rows_BS)
    for name, values in roles.saturation.overlap.items():
        shared = [len(set(a) & set(b)) for a, b in zip(early[name].tolist(), late[name].tolist(), strict=True)]
        assert values[0] == pytest.approx(sum(shared) / late[name].size)
        assert values[-1] == 1.0
    assert roles.saturation.steps == (5, 10, 12)


def test_the_command_writes_the_file_and_pictures(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["specialise", str(run), "--tokens", "1024", "--out", str(tmp_path), "--json"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    roles = read_roles(run)
    assert Roles.from_json(printed.encode()) is not None
    assert json.loads(printed) == json.loads((run / FILE_NAME).read_bytes())
    assert roles.layers[0].splits[DOMAIN].groups == ("text", "parsing")
    assert sum(roles.layers[0].load) == 2 * roles.num_tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "specialisation-saturation.png", "specialisation-tokens-layers.0.png", "specialisation-tokens-layers.1.png",
        "specialisation.png",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(["specialise", str(run), "--tokens", "1024", "--out", str(tmp_path)])
    assert "What the expert tells about a token" in capsys.readouterr().out


def test_text_of_a_file(run, tmp_path, corpus_file):
    roles = specialise(run, num_tokens=8000, data=str(corpus_file))
    assert roles.layers[0].splits[DOMAIN].groups == ("text", "parsing")
    assert sum(roles.layers[0].splits[DOMAIN].tokens) == roles.num_tokens
    one = specialise(run, num_tokens=100, data=str(corpus_file))
    assert DOMAIN not in one.layers[0].splits
    assert "all tokens that were routed are of one domain" in one.notes[0]
    assert roles.text == "text of stdlib.jsonl"
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "a b", "domain": "x"}))
    with pytest.raises(ValueError, match="data: expected more than 32 tokens, one window, got"):
        specialise(run, data=str(short))


def test_an_interruption_leaves_what_was_there(run):
    before = (run / FILE_NAME).read_bytes() if (run / FILE_NAME).exists() else None
    files = sorted(path.name for path in run.iterdir())

    def stop(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        specialise(run, num_tokens=512, advance=stop)
    assert ((run / FILE_NAME).read_bytes() if (run / FILE_NAME).exists() else None) == before
    assert sorted(path.name for path in run.iterdir()) == files


def test_progress_ends_where_it_says(run):
    told = []
    specialise(run, num_tokens=512, advance=lambda done, total, what: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_what_cannot_be_done_is_said(run, tmp_path):
    with pytest.raises(ValueError, match="tokens: expected at least 32, one window of the model's, got 5"):
        specialise(run, num_tokens=5)
    with pytest.raises(ValueError, match="expected a run folder"):
        specialise(tmp_path)
    config, held = run / "config.json", run / HELD_OUT
    kept, bytes_of = config.read_text(), held.read_bytes()
    config.write_text(kept.replace("stdlib.jsonl", "gone.jsonl"))
    held.unlink()
    try:
        with pytest.raises(ValueError, match=r"none was kept with it; say --data FILE\.jsonl"):
            specialise(run)
    finally:
        config.write_text(kept)
        held.write_bytes(bytes_of)


def test_kept_rows_are_documents(run):
    loaded = load(run)
    stream = stream_of_rows(loaded.held_out_BS, loaded.tokenizer)
    S = loaded.held_out_BS.shape[1] - 1
    assert stream.tokens_N[:-1].reshape(-1, S).tolist() == loaded.held_out_BS[:, :-1].tolist()
    documents = np.searchsorted(stream.ends_M, np.arange(stream.num_tokens - 1), side="right")
    assert documents.tolist() == np.repeat(np.arange(len(loaded.held_out_BS)), S).tolist()
