"""docs/claims.md and its pictures: written by the command out of what was found, never by hand."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.bench.claims.claim import Found, NotRunError, Reading, Verdict
from equipoise.bench.claims.curves import Curve, curve_table, draw_curve, measure_curve
from equipoise.bench.claims.pictures import draw_theme
from equipoise.bench.claims.runs import Runs
from equipoise.bench.report import provenance
from equipoise.disk.atomic import atomic_write

METRICS = {
    "loss": "validation loss [nats]",
    "max_violation": "MaxVio, end of the run",
    "early_violation": "MaxVio, first quarter",
    "specialisation": "domain and expert, mutual information [nats]",
}
VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "open", "can't be tested here", "not run yet")
PREFACE = """# What published claims come to here

Claims about routing and its collapse, each measured by a small function of this package. This page is written by
`equipoise bench claims --report`; nothing in it is typed by hand.

How to read it. *Claimed* is the range in which a claim puts a number, *ours* the mean (the median of timings) with its
95 % confidence interval. **Supported**: the whole interval lies in the range. **Contradicted**: no part of it does.
**Open**: it lies across an end, or on the claim's side but within noise. Loss is compared as non-inferiority, with the
margin that is stated; superiority is claimed only beyond the noise floor. Each claim has a control in which its effect
is absent by set-up, measured by the same function: where the control passes too, the claim is open. Where a set-up is
at hand in which the effect is present for sure, a claim is contradicted only if the measurement finds it there. Of many
intervals one in twenty misses by chance.

Training is that of a model of half a million parameters on two CPU cores. What holds for it may not hold for one that
is a million times as large, and the other way round: a verdict is about the claim as tried here.
"""


@dataclass(frozen=True)
class Page:
    """Where the page and its pictures go, and the command that is to be named on it."""

    path: Path
    pictures: Path
    command: str


def write_report(found: Sequence[Found], runs: Runs, page: Page, curves: Sequence[Curve] = ()) -> list[Path]:
    """Write the page, a picture per theme with numbers and one per curve; return what was written. Needs matplotlib."""
    themes = list(dict.fromkeys(each.claim.theme for each in found))
    written = []
    parts = [PREFACE, _provenance(runs, page), _summary(found), _noise(runs)]
    for theme in themes:
        of_theme = [each for each in found if each.claim.theme == theme]
        parts.append(f"## {theme[0].upper()}{theme[1:]}\n\n{_table(of_theme)}")
        if any(each.readings for each in of_theme):
            path = page.pictures / f"claims-{theme.replace(' ', '-')}.png"
            draw_theme(of_theme, path)
            written.append(path)
            parts.append(_picture(f"Intervals of {theme}, with what is claimed and the controls", path, page))
        for curve in [curve for curve in curves if curve.theme == theme]:
            text, picture = _curve(curve, runs, page)
            parts += text
            written += [picture] if picture else []
        parts += [_details(each) for each in of_theme]
    with atomic_write(page.path) as file:
        file.write(("\n\n".join(part.strip() for part in parts if part) + "\n").encode())
    return [page.path, *written]


def _provenance(runs: Runs, page: Page) -> str:
    facts = provenance()
    return (
        f"`{page.command}`, {facts['date'].split()[0]}; {facts['cores']} cores {facts['cpu']}, "
        f"{facts['instructions']}, {facts['threads']} thread(s), torch {facts['torch']}, no GPU. Training: seeds "
        f"{', '.join(map(str, runs.seeds))}; trials of what needs none: {runs.trials}."
    )


def _summary(found: Sequence[Found]) -> str:
    counts = Counter(each.verdict for each in found)
    listed = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"{len(found)} claims: {listed}."


def _noise(runs: Runs) -> str:
    """The A/A runs."""
    lines = ["## Noise floor", ""]
    try:
        rows = []
        for metric, name in METRICS.items():
            floor, differences = runs.floor(metric), runs.noise_differences(metric)
            largest = max(abs(difference) for difference in differences)
            rows.append(f"| {name} | {len(differences)} | {largest:.3g} | {floor:.3g} |")
    except NotRunError:
        return "\n".join([*lines, "Not run yet: it needs the training runs. The other claims need none."])
    lines += [
        "Pairs of runs with the same seed that differ by a tenth of a percent in the balancing coefficient, or in the",
        "learning rate: nothing that matters. The floor is how far from zero the interval of their differences goes.",
        "",
        "| number | pairs | largest difference | floor |",
        "| --- | ---: | ---: | ---: |",
    ]
    return "\n".join([*lines, *rows])


def _curve(curve: Curve, runs: Runs, page: Page) -> tuple[list[str], Path | None]:
    """(parts of the page, the picture if there is one)."""
    title = f"### {curve.title}"
    try:
        drawn = measure_curve(curve, runs)
    except NotRunError as error:
        return [title, f"Not run yet: {error}."], None
    path = page.pictures / f"claims-{curve.name}.png"
    draw_curve(drawn, path)
    note = f"{curve.note[0].upper()}{curve.note[1:]}." if curve.note else ""
    return [title, note, _picture(f"{curve.title}: the numbers of the table", path, page), curve_table(drawn)], path


def _picture(text: str, path: Path, page: Page) -> str:
    return f"![{text}]({Path(os.path.relpath(path, page.path.parent)).as_posix()})"


def _table(found: Sequence[Found]) -> str:
    lines = ["| claim | theirs | claimed | ours | verdict |", "| --- | --- | --- | --- | --- |"]
    for each in found:
        claimed = "; ".join(str(reading.claimed) for reading in each.readings) or "-"
        ours = "; ".join(shown(reading) for reading in each.readings) or "-"
        cells = (f"[{each.claim.hypothesis}](#{each.claim.name})", each.claim.theirs, claimed, ours, each.verdict)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def _details(found: Found) -> str:
    claim = found.claim
    lines = [f'<a id="{claim.name}"></a>', f"**`{claim.name}`** {claim.hypothesis}. *{found.verdict}*", ""]
    lines.append(f"- Source: {claim.where}. Theirs: {claim.theirs}.")
    if not claim.untestable:
        lines.append(f"- Tried: {claim.method}.")
    for name, text, readings in (
        ("Ours", "", found.readings),
        ("Control", f" ({claim.control_is})", found.control),
        ("Effect for sure", f" ({claim.present_is})", found.present),
    ):
        lines += [
            f"- {name}{text}: {reading.name} {shown(reading)}, claimed {reading.claimed}: {reading.outcome}."
            for reading in readings
        ]
    if not found.readings and claim.control_is:
        lines.append(f"- Control: {claim.control_is}.")
    if found.note:
        lines.append(f"- {found.note[0].upper()}{found.note[1:]}.")
    return "\n".join(lines)


def shown(reading: Reading) -> str:
    """A mean with its interval and unit."""
    interval = reading.interval
    unit = f" {reading.unit}" if reading.unit else ""
    if reading.method == "exact":
        return f"{_number(interval.mean)}{unit}"
    if not math.isfinite(interval.low):
        return f"{_number(interval.mean)}{unit} (one value, no interval)"
    return f"{_number(interval.mean)} [{_number(interval.low)}, {_number(interval.high)}]{unit}"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.2e}"
