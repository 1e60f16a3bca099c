"""An incident as a file that one can share: what happened when, with the numbers and the pictures. Markdown and HTML.

Times are wall-clock where the run recorded them. Nothing is written that the evidence does not hold.
"""

from __future__ import annotations

import base64
import html
import re
from datetime import UTC, datetime
from pathlib import Path

from equipoise.monitor.evidence import Evidence
from equipoise.monitor.incidents import DONE, PAGE, REPAIR_COLUMNS, changes_of, effect_text, repair_row, target
from equipoise.monitor.plot import draw_layer_load
from equipoise.monitor.triage import Triage, onset
from equipoise.types import Action

NO_REPAIR = "No repair is recorded."
_HTML = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100%; background: #fff }} table {{ border-collapse: collapse }}
td, th {{ padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top }}
.wide {{ overflow-x: auto }} .trouble {{ color: #c8321e; font-weight: 600 }} .unknown {{ opacity: .7 }}
</style></head><body>{body}</body></html>
"""


def write_report(evidence: Evidence, found: Triage, path: str | Path) -> tuple[Path, Path]:
    """Write `path`.md and `path`.html, and the pictures of the layers that collapsed beside them; return both.

    path: without a suffix, or with one of the two. The HTML holds its pictures and needs no other file.
    Raises ImportError where matplotlib is missing.
    """
    base = Path(path)
    base = base.with_suffix("") if base.suffix in (".md", ".html") else base
    base.parent.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, (layer, marks) in enumerate(_marks(evidence).items(), start=1):
        name = base.with_name(f"{base.name}-{number}.png")
        pictures.append((layer, draw_layer_load(evidence.routing[layer], name, marks=marks)))
    markdown = base.with_suffix(".md")
    markdown.write_text(_markdown(evidence, found, pictures), encoding="utf-8")
    page = base.with_suffix(".html")
    page.write_text(_html(evidence, found, pictures), encoding="utf-8")
    return markdown, page


def timeline(evidence: Evidence) -> list[tuple[int, str, str]]:
    """(step, time or "", what) from the first symptom to the last resolution, in order."""
    events = []
    for layer, history in evidence.routing.items():
        if span := onset(history):
            events.append((span[0], f"{layer}: the first flush that shows the collapse"))
            after = [stats.step for stats in history if stats.step > span[1]]
            if after:
                events.append((after[0], f"{layer}: the first flush that is even again"))
    for alert in evidence.alerts:
        what = alert.finding.message if alert.state == "firing" else alert.key
        events.append((alert.step, f"alert {alert.state}: {what}"))
    events += [(action.step, _change(action)) for action in changes_of(evidence.actions)]
    return [(step, _time(evidence, step), what) for step, what in sorted(events, key=lambda event: event[0])]


def _change(action: Action) -> str:
    """One change of a repair, as a sentence of the timeline."""
    why = f": {action.note}" if action.note else ""
    if action.kind == PAGE:
        return f"a human is called for {action.reason}{why}"
    numbers = effect_text(action.detail)
    about = f"repair {action.state}: {action.kind} on {target(action)}, for {action.reason}"
    return about + (f" ({numbers})" if numbers else "") + why


def _marks(evidence: Evidence) -> dict[str, dict[str, int]]:
    """The layers that had collapsed, with the steps to mark in their pictures."""
    found: dict[str, dict[str, int]] = {}
    for layer, history in evidence.routing.items():
        span = onset(history)
        if span is None:
            continue
        marks = {"collapse": span[0]}
        about = [i for i in evidence.incidents if i.finding.layer == layer and i.finding.rule == "collapse"]
        incident = next((i for i in about if i.lasted_until(span[1]) >= span[0]), None)
        if incident is not None:
            marks["detected"] = incident.fired
        for action in evidence.repairs:
            if action.layer in (layer, "") and action.state in DONE and action.step >= span[0]:
                marks.setdefault("repair undone" if action.state == "undone" else "repaired", action.step)
        if incident is not None and incident.resolved is not None:
            marks["resolved"] = incident.resolved
        found[layer] = marks
    return found


def _markdown(evidence: Evidence, found: Triage, pictures: list[tuple[str, Path]]) -> str:
    lines = [f"# Post-mortem: {_cell(evidence.name)}", "", _cell(found.conclusion), "", "## Timeline", ""]
    lines += ["| step | time | what |", "|---|---|---|"]
    lines += [f"| {step} | {when} | {_cell(what)} |" for step, when, what in timeline(evidence)]
    lines += ["", "## Repairs", ""]
    repaired = [repair_row(action) for action in evidence.repairs]
    if repaired:
        lines += [f"| {' | '.join(REPAIR_COLUMNS)} |", "|" + "---|" * len(REPAIR_COLUMNS)]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in repaired]
    else:
        lines.append(NO_REPAIR)
    lines += ["", "## What was asked, and the answers", "", "| question | | answer |", "|---|---|---|"]
    lines += [f"| {_cell(c.question)} | {c.verdict} | {_cell(c.answer)} |" for c in found.checks]
    remedies = [check.remedy for check in found.checks if check.verdict == "trouble" and check.remedy]
    if remedies:
        lines += ["", "## What to do", "", *[f"- {_cell(remedy)}" for remedy in remedies]]
    for layer, picture in pictures:
        lines += ["", f"## {_cell(layer)}", "", f"![share of the tokens of each expert]({picture.name})"]
    return "\n".join(lines) + "\n"


def _html(evidence: Evidence, found: Triage, pictures: list[tuple[str, Path]]) -> str:
    e = html.escape
    rows = "".join(f"<tr><td>{s}<td>{e(when)}<td>{e(what)}</tr>" for s, when, what in timeline(evidence))
    checks = "".join(
        f'<tr class="{c.verdict}"><td>{e(c.question)}<td>{c.verdict}<td>{e(c.answer)} {e(c.remedy)}</tr>'
        for c in found.checks
    )
    made = [repair_row(action) for action in evidence.repairs]
    repaired = "".join(f"<tr>{''.join(f'<td>{e(text)}' for text in row)}</tr>" for row in made)
    columns = "".join(f"<th>{name}" for name in REPAIR_COLUMNS)
    body = (
        f"<h1>Post-mortem: {e(evidence.name)}</h1><p>{e(found.conclusion)}</p><h2>Timeline</h2>"
        f"<table><tr><th>step<th>time<th>what</tr>{rows}</table><h2>Repairs</h2>"
        + (
            f'<div class="wide"><table><tr>{columns}</tr>{repaired}</table></div>'
            if repaired
            else f"<p>{NO_REPAIR}</p>"
        )
        + f"<h2>What was asked, and the answers</h2><table>{checks}</table>"
    )
    for layer, picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        body += f'<h2>{e(layer)}</h2><img alt="share of the tokens of each expert" src="data:image/png;base64,{data}">'
    return _HTML.format(title=e(evidence.name), body=body)


def _cell(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table."""
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.splitlines()))
    return text.replace("<", "&lt;")


def _time(evidence: Evidence, step: int) -> str:
    known = [at for at in evidence.times if at <= step]
    if not known:
        return ""
    return datetime.fromtimestamp(evidence.times[max(known)], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
