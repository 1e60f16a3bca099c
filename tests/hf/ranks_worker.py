"""One rank of tests/hf/test_ranks.py: FOLDER. Two ranks hold half of each layer's experts, by transformers itself."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tests.monitor.transformers_models import batch
from transformers.distributed import DistributedConfig

import equipoise.hf
from equipoise.hf import forward


def local(tensor):
    """This rank's part of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def run(folder: Path, calls: list[int]) -> dict:
    """Logits without gradients and in training, and the gradients of this rank's experts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        experts_implementation=equipoise.hf.NAME,
        distributed_config=DistributedConfig(tp_size=2, ep_size=2),
    )
    tokens, _ = batch(B=4, S=8)
    with torch.no_grad():
        logits = model(tokens).logits
    out = model.train()(tokens, labels=tokens)
    out.loss.backward()
    experts = model.model.layers[0].mlp.experts
    grads = {name: local(p.grad) for name, p in experts.named_parameters()}
    return {"logits": logits, "training": out.logits.detach(), "grads": grads, "calls": len(calls)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    calls: list[int] = []
    for table in (forward.PLAIN, forward.CUSTOM):
        for name, function in list(table.items()):
            table[name] = lambda x, *rest, function=function: (calls.append(len(x)), function(x, *rest))[1]
    results = {path.name: run(path, calls) for path in sorted(folder.iterdir()) if path.is_dir()}
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.barrier()  # none leaves while the other still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
