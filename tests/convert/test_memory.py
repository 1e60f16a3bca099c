"""A conversion needs memory for a tensor or a shard, not for the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers

CONVERT = '''
import json, sys
from pathlib import Path
from equipoise.convert import export_checkpoint, import_checkpoint

def more(work):
    """How far the resident memory of the process went above where it was."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = high()
    work()
    return high() - before

def high():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

folder = Path(sys.argv[1])
into = more(lambda: import_checkpoint(folder / "theirs", folder / "ours"))
out = more(lambda: export_checkpoint(folder / "ours", folder / "back", shard_bytes=20_000_000))
print(json.dumps([into, out]))
'''


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_is_a_fraction_of_the_model(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=8,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "theirs", max_shard_size="20MB")
    size = sum(file.stat().st_size for file in (tmp_path / "theirs").glob("*.safetensors"))
    assert size > 400_000_000
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(tmp_path)], check=True, capture_output=True, text=True, timeout=300
    )
    into, out = json.loads(done.stdout.splitlines()[-1])
    print(f"{size / 1e6:.0f} MB of weights: {into / 1e6:.0f} MB more memory on the way in, {out / 1e6:.0f} MB out")
    assert 1_000_000 < into < 0.25 * size
    assert 1_000_000 < out < 0.25 * size
