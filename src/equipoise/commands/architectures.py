"""`equipoise bench architectures`: dense, MoE and the others, at the same active arithmetic."""

from __future__ import annotations

from pathlib import Path

from equipoise.commands.shown import Json


def architectures(
    *,
    only: tuple[str, ...] = (),
    seeds: int = 3,
    steps: int = 300,
    batches: tuple[int, ...] = (1, 4, 16, 32),
    contexts: tuple[int, ...] = (1024, 8192),
    quick: bool = False,
    out: Path = Path("runs/architectures"),
    json_: Json = False,
) -> int:
    """Architectures side by side: the same text, batches and active FLOPs per token, seeds paired.

    Each is trained on the embedded corpus; then training steps are timed in turns, decoding by the number of answers
    at once with p50 and p99 of a step, and long prompts. A width of each architecture is fitted so that all
    have the same FLOPs. A difference in loss comes with its 95 % interval: "not worse" means all of it below 0.02
    nats. Writes OUT/architectures.json, .md and .png.

    Ctrl-C loses nothing: trainings that are done are kept in --out, and the same command goes on.

    For example: equipoise bench architectures --only "equal FLOPs" --out runs/architectures

    Args:
        only: Architectures, by parts of their names; the baseline, MoE top-2, is always there. Default: all.
        seeds: Trainings of each.
        steps: Of each training, of 2,048 tokens; 300 take about half a minute.
        batches: Answers at once.
        contexts: Lengths of long prompts.
        quick: One seed, few steps, short prompts: does it run? Its figures say nothing.
        out: Folder of the results.
        json_: Print what is in architectures.json, and nothing else.
    """
    from equipoise.bench.architectures.arms import ARMS
    from equipoise.bench.architectures.compare import Comparison, compare
    from equipoise.bench.architectures.plot import plot
    from equipoise.bench.progress import Pieces
    from equipoise.bench.report import Report, as_json, markdown, print_tables
    from equipoise.disk.atomic import atomic_write
    from equipoise.host.extras import require

    require("matplotlib.figure", "plot")  # before the runs, not after
    names = tuple(name for name in ARMS if not only or any(part in name for part in only))
    if not names:
        raise ValueError(f"bench architectures: expected --only to name some of {', '.join(ARMS)}; got {only}")
    wanted = Comparison(names, seeds, steps, batches, contexts=contexts)
    if quick:
        wanted = Comparison(names, 1, 4, (1, 2), decode_tokens=4, contexts=(64,), rounds=1)
    found = compare(wanted, out / "cells", Pieces(wanted.num_pieces).done)
    report = Report({"seeds": wanted.seeds, "steps": wanted.steps}, found.tables)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("json", as_json(report)), ("md", markdown(report))):
        with atomic_write(out / f"architectures.{name}") as file:
            file.write(text.encode())
    picture = plot(found, wanted.batches, out / "architectures.png")
    if json_:
        print(as_json(report))
    else:
        print_tables(report)
        print(f"picture  {picture}\nnumbers  {out / 'architectures.json'}")
    return 0
