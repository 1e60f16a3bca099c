"""Commands that look at runs and at recorded routing: watch, triage, diagnose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from equipoise.commands.shown import Json

if TYPE_CHECKING:
    from equipoise.monitor.evidence import Evidence
    from equipoise.monitor.triage import Triage
    from equipoise.types import RoutingStats


def watch(run: Annotated[Path, tyro.conf.Positional], /, *, once: bool = False, json_: Json = False) -> int:
    """Show a running or finished run: loss, load of every expert, alerts, repairs.

    For example: equipoise watch runs/demo --once

    Args:
        run: The run folder.
        once: Print once and return, also while the run goes on.
        json_: The newest routing statistics, alerts, repairs (a record for each) and incidents, as one JSON object.
    """
    from equipoise.monitor.terminal import watch_run

    if json_:
        print(json.dumps(_snapshot(run)))
    else:
        watch_run(run, follow=not once)
    return 0


def triage(run: Annotated[str, tyro.conf.Positional], /, *, report: Path | None = None, json_: Json = False) -> int:
    """It is 2 a.m.: what is wrong with this run, where, since when, what changed, and what to do.

    Walks a decision tree with the run's own numbers, running or finished, or with those of a running server, which is
    asked for them: equipoise triage http://127.0.0.1:8000. The exit code is 0 when nothing is wrong now, 1 when
    something is, 2 when there was no answer.

    For example: equipoise triage runs/demo --report post-mortem

    Args:
        run: The run folder, or the address of a server; EQUIPOISE_API_KEY has its key, if it asks for one.
        report: Also write a post-mortem here, as Markdown, HTML and pictures: the timeline from the first symptom to
            the resolution, and every question with its answer. Needs the extra `plot`.
        json_: The checks and the conclusion, as one JSON object.
    """
    from dataclasses import asdict

    from equipoise.monitor.evidence_http import evidence_of_url, is_address
    from equipoise.monitor.postmortem import write_report
    from equipoise.monitor.triage import triage as walk

    evidence = evidence_of_url(run) if is_address(run) else _evidence(run)
    found = walk(evidence, run)
    written = [str(path) for path in write_report(evidence, found, report)] if report else []
    if json_:
        print(json.dumps(asdict(found) | {"healthy": found.healthy, "report": written}))
    else:
        _print_triage(found)
        for path in written:
            print(f"report  {path}")
    return 0 if found.healthy else 1


def _evidence(run: str) -> Evidence:
    from equipoise.monitor.evidence import evidence_of
    from equipoise.monitor.store import RunStore

    with RunStore.open_readonly(run) as store:
        return evidence_of(store)


def diagnose(
    path: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    num_layers: int | None = None,
    ignore_ids: tuple[int, ...] = (),
    drop_repeated: bool = False,
    skip_layers: tuple[int, ...] = (),
    json_: Json = False,
) -> int:
    """Routing that another server or framework recorded: load, entropy, dead experts, collapse, layer by layer.

    Reads vLLM's and SGLang's routed_experts (.npy, .json, .jsonl), SGLang's expert distribution (.pt), and plain .npz
    and .parquet. The exit code is 0 when nothing is wrong, 1 when something is.

    For example: equipoise diagnose routed_experts.npy --num-experts 64

    Args:
        path: The file.
        num_experts: Routed experts of each layer. Needed for expert ids: an expert that nobody chose is in no file.
        top_k: Experts per token. Needed for counts that do not say their number of tokens.
        num_layers: With top_k, for ids without a shape.
        ignore_ids: Ids that mark slots without a routed expert, such as -1 or 255. Left out and counted.
        drop_repeated: Leave out and count tokens that name an expert twice: rows of zeros for tokens not routed.
        skip_layers: Layers that are dense, and in the file as zeros.
        json_: Statistics and findings, as one JSON object.
    """
    from dataclasses import asdict

    from equipoise.monitor.recorded import diagnose as read

    found = read(
        path,
        num_experts=num_experts,
        top_k=top_k,
        num_layers=num_layers,
        ignore_ids=ignore_ids,
        drop_repeated=drop_repeated,
        skip_layers=skip_layers,
    )
    if json_:
        findings = [asdict(finding) for finding in found.findings]
        print(json.dumps({"layers": [_plain(stats) for stats in found.stats], "findings": findings}))
    else:
        _print_layers(found.stats)
        for finding in found.findings:
            print(f"{finding.severity}: {finding.message}. {finding.remedy}")
        left_out = {"slots ignored": sum(found.num_ignored.values()), "tokens repeated": found.num_repeated}
        print(", ".join(f"{what} {count}" for what, count in left_out.items() if count) or "every token counted")
        if found.without_opinion:
            print(f"too few tokens for an opinion: {', '.join(sorted(found.without_opinion))}")
    return 1 if found.findings else 0


def _print_triage(found: Triage) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "trouble": "bold red", "past": "yellow", "unknown": "dim"}
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for check in found.checks:
        answer = escape(check.answer)
        if check.verdict in ("trouble", "unknown") and check.remedy:
            answer += f"\n[italic]{escape(check.remedy)}[/]"
        table.add_row(f"[{colours[check.verdict]}]{check.verdict}[/]", escape(check.question), answer)
    console = Console()
    console.print(table)
    console.print(f"\n{escape(found.conclusion)}")
    for check in found.checks:  # whole, on a line of its own, so that it can be copied
        if check.verdict in ("trouble", "unknown") and check.command:
            console.print()
            if not check.remedy or check.remedy not in found.conclusion:  # it has just been read there
                console.print(escape(check.remedy or check.question), style="italic")
            console.print(check.command, style="bold", soft_wrap=True, markup=False, highlight=False)


def _print_layers(stats: tuple[RoutingStats, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "tokens", "effective", "MaxVio", "load entropy", "busiest", "dead"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for s in stats:
        table.add_row(
            s.layer,
            f"{s.num_tokens:,}",
            f"{s.effective_experts:.1f}/{s.num_experts}",
            f"{s.max_violation:.2f}",
            f"{s.load_entropy:.3f}",
            f"{s.max_token_share:.1%}",
            str(len(s.dead_experts)),
        )
    Console().print(table)


def _snapshot(run: Path) -> dict[str, object]:
    from dataclasses import asdict

    from equipoise.monitor.incidents import incidents, repairs
    from equipoise.monitor.store import RunStore
    from equipoise.monitor.store_records import nulls

    with RunStore.open_readonly(run) as store, store.snapshot():
        alerts, actions = store.alerts(), store.actions()
        found: dict[str, object] = {
            "meta": store.meta(),
            "routing": [_plain(stats) for stats in store.latest_routing()],
            "alerts": [asdict(alert) for alert in alerts],
            "actions": [asdict(action) for action in actions],
            "repairs": [asdict(action) for action in repairs(actions)],
            "incidents": [asdict(incident) for incident in incidents(alerts, actions)],
        }
    return {key: nulls(value) for key, value in found.items()}


def _plain(stats: RoutingStats) -> dict[str, Any]:
    """The fields of the record, as JSON has them."""
    from dataclasses import asdict

    from equipoise.monitor.store_records import nulls

    return {key: nulls(value) for key, value in (asdict(stats) | {"counts_E": stats.counts_E.tolist()}).items()}
