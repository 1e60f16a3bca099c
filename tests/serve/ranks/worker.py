"""One process of tests/serve/ranks/test_model.py: FOLDER CASE... Rank 0 serves each case and notes what came of it."""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.serve.ranks.cases import CASES, LARGE
from tests.serve.small import mixed_requests, tiny_engine

from equipoise.monitor.recorder import Recorder
from equipoise.parallel import CollectiveError
from equipoise.plan.placement_file import read_placements
from equipoise.serve.ranks.front import Ranks, SpreadConfig
from equipoise.serve.ranks.holder import Holder
from equipoise.serve.ranks.lines import Line, Lines
from equipoise.serve.ranks.world import World, joined

TOKENS_BS = torch.arange(60).view(3, 20) * 7 % 256


def opened(folder: Path, name: str, lines: Lines) -> Ranks:
    case, placement = CASES.get(name, LARGE), folder / "placement.json"
    placements = read_placements(placement) if placement.is_file() else None
    path = folder / "checkpoints" / "step-000001"
    return Ranks(path, lines, SpreadConfig(placements, case.payload), case.dtype)


@torch.inference_mode()
def logits(ranks: Ranks) -> torch.Tensor:
    return ranks.loaded.model(TOKENS_BS)


def serve(folder: Path, name: str, lines: Lines) -> None:
    """Logits, answers, counts, bytes, and one expert after the other; then other weights, and back."""
    ranks = opened(folder, name, lines)
    model, note = ranks.loaded.model, {}
    recorder = Recorder(model)
    sent, expected = bytes_of_rows(ranks)
    out = {"logits": logits(ranks)}
    note["sent"] = [sent(), expected()]
    for stats in recorder.flush(0):
        out[f"counts.{stats.layer}"] = torch.from_numpy(stats.counts_E)
    recorder.detach()
    for layer, moe in model.moe_layers.items():
        for expert in range(moe.experts.num_experts):
            up, down = moe.experts.weights_of(expert)
            out[f"up.{layer}.{expert}"], out[f"down.{layer}.{expert}"] = up.clone(), down.clone()
    note["answers"] = {id: each.token_ids for id, each in run(ranks).items()}
    note["scalars"] = ranks.scalars()
    reload(folder, ranks, out, note)
    save_file({key: tensor.contiguous() for key, tensor in out.items()}, folder / "out.safetensors")
    (folder / "out.json").write_text(json.dumps(note))


def run(ranks: Ranks):
    from tests.serve.small import answers

    engine = tiny_engine(ranks.loaded.model, fatal=ranks.fatal)
    try:
        return answers(engine, mixed_requests(12))
    finally:
        engine.close()


def reload(folder: Path, ranks: Ranks, out: dict, note: dict) -> None:
    put_in = ranks.read(folder / "checkpoints" / "step-000002")
    assert torch.equal(logits(ranks), out["logits"])  # read, and not in force
    done = put_in()
    out["after"], note["digest"] = logits(ranks), done.digest
    done.undo()
    done.undo()
    out["back"] = logits(ranks)
    put_in = ranks.read(folder / "checkpoints" / "step-000003")
    try:
        put_in()
    except ValueError as error:
        note["refused"] = str(error)
    try:
        ranks.read(folder / "checkpoints" / "step-000009")
    except ValueError as error:
        note["missing"] = str(error)
    out["kept"] = logits(ranks)


def bytes_of_rows(ranks: Ranks):
    """(bytes sent from now on, what the routers' choices come to): headers, rows of float64 and errands."""
    before, model = sum(line.sent_bytes for line in ranks.lines.all), ranks.loaded.model
    total = Counter()

    def see(name):
        def add(module, args, routed):
            decision, slots = routed.decision, ranks.placements[name].slots
            pairs = zip(decision.token_ids_N.tolist(), decision.expert_ids_N.tolist(), strict=True)
            by_rank = {}
            for token, expert in pairs:
                rank = next(
                    (rank for rank, held in enumerate(slots) if expert in held), 0
                )  # zero experts have no place
                by_rank.setdefault(rank, []).append(token)
            for rank, tokens in by_rank.items():
                if rank:
                    total["bytes"] += 40 + 12 * len(tokens) + 8 * 32 * len(set(tokens))

        return add

    handles = [layer.tap.register_forward_hook(see(name)) for name, layer in model.moe_layers.items()]

    def expected() -> int:
        for handle in handles:
            handle.remove()
        return total["bytes"]

    return lambda: sum(line.sent_bytes for line in ranks.lines.all) - before, expected


def lose(folder: Path, lines: Lines, last: int) -> None:
    """The last rank is killed; the next forward that needs it says so, and all later ones at once."""
    ranks = opened(folder, "plain", lines)
    noted = []
    lines.on_lost = lambda: noted.append("lost")
    os.kill(int((folder / f"pid-{last}").read_text()), signal.SIGKILL)
    began = time.monotonic()
    told = []
    for _ in range(2):
        try:
            logits(ranks)
        except CollectiveError as error:
            told.append(str(error))
    (folder / "lost.json").write_text(json.dumps([*told, *noted, time.monotonic() - began]))


def resident(name: str) -> int:
    """Bytes of this process, VmRSS now or VmHWM at most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def remember(folder: Path, world: World) -> None:
    """Load a large model, and note how much memory that took at most."""
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")  # the most so far is what is there now
    before = resident("VmRSS")
    if world.rank:
        Holder(Line(0, world)).run()
    else:
        lines = Lines(world)
        try:
            opened(folder / "large", "large", lines)
        finally:
            lines.close()
    (folder / f"memory-{world.rank}").write_text(str(resident("VmHWM") - before))


def front(folder: Path, names: list[str], world: World) -> None:
    lines = Lines(world)
    try:
        for name in names:
            serve(folder / name, name, lines)
        lose(folder / "plain", lines, world.size - 1)
    finally:
        lines.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *names = sys.argv[1:]
    with joined(20.0) as world:
        if names == ["large"]:
            remember(Path(folder), world)
        elif world.rank == 0:
            front(Path(folder), names, world)
        else:
            (Path(folder) / "plain" / f"pid-{world.rank}").write_text(str(os.getpid()))
            Holder(Line(0, world)).run()
            assert threading.active_count() == 1
