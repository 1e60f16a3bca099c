"""The command `equipoise specialise`: its arguments, progress, table and pictures. What it counts is elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from equipoise.commands.shown import Json, wide_console

if TYPE_CHECKING:
    from equipoise.monitor.specialisation import LayerRoles, Roles
    from equipoise.train.specialise import Advance

SHOWN_TOKENS = 5  # in the table


def specialise(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    tokens: int = 32_768,
    data: str | None = None,
    out: Path | None = None,
    json_: Json = False,
) -> int:
    """Which experts of a run serve which domain, kind of token, position and words, and since when.

    Puts held-out text through every kept checkpoint, counts who goes where, beside what chance explains, and writes
    specialisation.json into the run folder, which the dashboard shows, and pictures. Ctrl-C leaves nothing half done.

    For example: equipoise specialise runs/demo --data my.jsonl

    Args:
        run: The run folder, or a checkpoint in it.
        tokens: About so many tokens of text, spread evenly over it.
        data: A .jsonl file with "text" and "domain" in each line, or .txt, .parquet or a folder of files, each a
            domain. Default: the validation split of what the run was trained on, else the tokens kept with the run.
        out: Folder of the pictures. Default: the run folder. They need the extra `plot`; without it there are none.
        json_: Print what is in specialisation.json, and nothing else.
    """
    from equipoise.models.run_files import locate
    from equipoise.train.specialise import specialise as measure
    from equipoise.train.specialise import write_roles

    folder = locate(run)[0]
    with _progress() as advance:
        roles = measure(run, num_tokens=tokens, data=data, advance=advance)
    written = [write_roles(folder, roles), *draw(roles, folder if out is None else out)]
    if json_:
        print(roles.to_json().decode())
    else:
        print_roles(roles)
        for path in written:
            print(f"{'picture' if path.suffix == '.png' else 'numbers':8}{path}")
        print(f"{'look':8}equipoise dashboard {json.dumps(str(folder)) if ' ' in str(folder) else folder}")
    return 0


def draw(roles: Roles, folder: Path) -> list[Path]:
    """All pictures of them, each whole or not at all. Empty where matplotlib is missing."""
    from importlib.util import find_spec

    from equipoise.disk.atomic import atomic_path
    from equipoise.monitor.plot_specialisation import MAX_CLOUDS, draw_cloud, draw_maps, draw_saturation, short, spread

    if find_spec("matplotlib") is None:
        return []
    written = []
    with atomic_path(folder / "specialisation.png") as path:
        written.append(folder / "specialisation.png")
        draw_maps(roles, path)
    for layer in spread(roles.layers, MAX_CLOUDS):
        name = f"specialisation-tokens-{short(layer.layer).replace('/', '-')}.png"
        with atomic_path(folder / name) as path:
            written.append(folder / name)
            draw_cloud(layer, path)
    if len(roles.saturation.steps) > 1:
        with atomic_path(folder / "specialisation-saturation.png") as path:
            written.append(folder / "specialisation-saturation.png")
            draw_saturation(roles, path)
    return written


def print_roles(roles: Roles) -> None:
    """A table of the layers, one of the experts of the layer that tells most, and what is missing."""
    from rich.markup import escape

    console = wide_console()
    console.print(
        f"step {roles.step}: {roles.num_tokens:,} tokens in {roles.num_documents:,} documents, {escape(roles.text)}"
    )
    console.print(_layers_table(roles))
    most = max(roles.layers, key=lambda layer: layer.vocabulary.information.beyond_chance)
    console.print(_experts_table(most))
    for kind in ("domain", "token class", "position"):
        if any(kind in layer.splits for layer in roles.layers):
            found = roles.found(kind)
            console.print(
                f"by {kind}: beyond chance in {escape(', '.join(found))}" if found else f"by {kind}: not beyond chance"
            )
    for note in roles.notes:
        console.print(f"[yellow]note[/]: {escape(note)}")


def _layers_table(roles: Roles) -> object:
    """What the expert tells, in nats, with what chance tells in brackets."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="What the expert tells about a token: nats (by chance)", title_justify="left", box=box.SIMPLE)
    table.add_column("layer")
    kinds = [kind for kind in ("domain", "token class", "position") if kind in roles.layers[0].splits]
    for name in (*kinds, "vocabulary", "first expert of a word", "saturation"):
        table.add_column(name, justify="right")
    for layer in roles.layers:
        told = [layer.splits[kind].information for kind in kinds] + [layer.vocabulary.information]
        curve = roles.saturation.overlap[layer.layer]
        table.add_row(
            escape(layer.layer),
            *(f"{each.nats:.3f} ({each.control:.3f})" for each in told),
            f"{layer.vocabulary.top_share:.0%} ({layer.vocabulary.control_top_share:.0%})",
            f"{curve[0]:.0%} at {roles.saturation.steps[0]}" if len(curve) > 1 else "-",
        )
    return table


def _experts_table(layer: LayerRoles) -> object:
    """The busiest experts of a layer and what each serves."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from equipoise.monitor.plot_specialisation import MAX_EXPERTS, busiest, printed

    kinds = [kind for kind in ("domain", "token class", "position") if kind in layer.splits]
    table = Table(title=f"{layer.layer}: what each expert serves beyond chance", title_justify="left", box=box.SIMPLE)
    for name in ("expert", "tokens"):
        table.add_column(name, justify="right")
    for name in (*kinds, "its tokens (· is a space)"):
        table.add_column(name)
    for expert in busiest(layer, MAX_EXPERTS):
        best = [layer.best_group(kind, expert) for kind in kinds]
        table.add_row(
            str(expert),
            f"{layer.load[expert] / max(layer.num_tokens, 1):.0%}",
            *("-" if each is None else f"{escape(each[0])} {each[1]:.1f}x" for each in best),
            escape("  ".join(printed(token) for token in layer.tokens[expert][:SHOWN_TOKENS])) or "-",
        )
    return table


@contextmanager
def _progress() -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)
