"""The side of benchmarks/export_vllm.py that needs no vLLM: our scores of a folder are those of transformers."""

import pytest
import torch
import transformers
from benchmarks.export_vllm import FAMILIES, _scores, ours, saved

from equipoise.convert import FAMILIES as KNOWN
from equipoise.convert import export_checkpoint, import_checkpoint


def test_every_family_is_compared():
    assert FAMILIES.keys() == KNOWN.keys()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_both_score_the_exported_folder_alike(family, tmp_path):
    saved(family, tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "exported")
    text = torch.randint(0, 512, (24,)).tolist()
    [mine] = ours(tmp_path / "ours", [text])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = _scores(model(torch.tensor([text])).logits[0], text)
    assert mine.std() > 0.5  # they could differ
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
