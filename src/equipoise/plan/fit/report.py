"""A plan as tables for the terminal, and as a picture of what fills a rank's memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from equipoise.plan.fit.known import KNOWN
from equipoise.plan.fit.memory import GIB, PARTS, Memory
from equipoise.plan.fit.parameters import parameters
from equipoise.plan.fit.plan import Plan
from equipoise.plan.fit.setup import Serving, Training

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = dict(
    zip(
        PARTS,
        (
            "#1b4965",
            "#5fa8d3",
            "#c8321e",
            "#e98a3c",
            "#1d7a3a",
            "#8cc084",
            "#7b4ea3",
            "#b9a7cf",
            "#8a8a8a",
            "#cfcfcf",
        ),
        strict=True,
    )
)
INK, GRID = "#333333", "#e6e6e6"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # behind numbers, which the limit's line may cross
MOST_BARS = 12


def _table(title: str, *columns: str, left: int = 1) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.min_width = len(title)  # or a long title would be wrapped to the width of a narrow table
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right")
    return table


def gib(size: float) -> str:
    """Bytes in GiB, or MiB where that would be 0.0."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 or size == 0 else f"{size / 2**20:,.1f} MiB"


def number(value: float | int | str) -> str:
    """As people read it: three significant digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def known_table() -> Table:
    """The models of the table, with what their makers say."""
    table = _table("Known models", "name", "total [B]", "published", "active [B]", "without embedding", "published")
    for name, known in KNOWN.items():
        counts = parameters(known.model)
        cells = (counts.total, counts.active, counts.active_no_embedding)
        total, active, bare = (f"{cell / 1e9:,.2f}" for cell in cells)
        table.add_row(name, total, f"{known.total_b:g}", active, bare, f"{known.active_b:g}")
    return table


def tables(plan: Plan) -> list[Table]:
    """Parameters, memory, communication, remedies, advice, rules of thumb: what there is to say."""
    found = [parameter_table(plan), memory_table(plan)]
    if plan.setup.mesh.expert > 1:
        found.append(communication_table(plan))
    if plan.remedies:
        found.append(remedy_table(plan))
    found.append(advice_table(plan))
    if plan.rules_of_thumb:
        found.append(rule_table(plan))
    return found


def parameter_table(plan: Plan) -> Table:
    """By part."""
    counts = plan.parameters
    table = _table(f"{plan.model.name}: parameters", "part", "number", "share")
    for part, size in counts.fields().items():
        if part.startswith(("total", "active")) or not size:
            continue
        table.add_row(part, f"{size:,}", f"{100 * size / counts.total:.1f} %")
    table.add_row("total", f"{counts.total:,}", "", style="bold")
    table.add_row("active", f"{counts.active:,}", f"{100 * counts.active_share:.1f} %")
    table.add_row("active, without the input's embedding", f"{counts.active_no_embedding:,}", "")
    return table


def memory_table(plan: Plan) -> Table:
    """By part, at the fullest moment."""
    mesh, work = plan.setup.mesh, plan.setup.work
    doing = "training" if isinstance(work, Training) else "serving"
    where = (
        f"{mesh.ranks} rank{'s' if mesh.ranks > 1 else ''}: {mesh.expert} share the experts, {mesh.data} such groups"
    )
    table = _table(
        f"Memory of a rank, {doing}, at its fullest: {plan.memory.moment} ({where})", "part", "size", "share"
    )
    for part, size in plan.memory.parts.items():
        if size:
            table.add_row(part, gib(size), f"{100 * size / plan.memory.total:.1f} %")
    table.add_row("total", gib(plan.memory.total), _verdict(plan), style="bold")
    if plan.memory.host:
        table.add_row("in host memory", gib(plan.memory.host), "")
    if plan.memory.max_vio:
        table.add_row("imbalance of ranks that has room (MaxVio)", f"{plan.memory.max_vio:.2f}", "")
    return table


def _verdict(plan: Plan) -> str:
    if plan.limit is None:
        return ""
    rest = plan.limit - plan.memory.total
    return f"fits, {gib(rest)} free" if rest >= 0 else f"{gib(-rest)} too much"


def communication_table(plan: Plan) -> Table:
    """Of a layer and of a step."""
    found = plan.communication
    step = "decoding step" if isinstance(plan.setup.work, Serving) else "micro-batch, forward and backward"
    table = _table(f"Communication of the busiest rank (one {step})", "what", "amount", "time")
    table.add_row("other ranks that a token goes to", f"{found.destinations:.2f}", "")
    table.add_row("dispatch, per MoE layer", f"{found.dispatch_bytes / 1e6:,.3g} MB", _ms(found.dispatch_s))
    table.add_row("combine, per MoE layer", f"{found.combine_bytes / 1e6:,.3g} MB", _ms(found.combine_s))
    table.add_row(f"all {found.layers} MoE layers", "", _ms(found.step_s))
    table.add_row("everything else of the step, at the least", "", _ms(found.work_s))
    table.add_row("exchanges, of a step that hides none", f"{100 * found.step_share:.0f} %", "")
    return table


def _ms(seconds: float) -> str:
    return f"{number(1e3 * seconds)} ms"


def remedy_table(plan: Plan) -> Table:
    """In the order of what they cost in quality."""
    table = _table("What would make it fit, the gentlest first", "change", "costs", "alone", "with all above", left=2)
    for each in plan.remedies:
        alone = f"{gib(each.memory.total)}{' fits' if each.fits else ''}"
        together = f"{gib(each.with_earlier)}{' fits' if each.enough else ''}"
        table.add_row(each.what, each.cost, alone, together)
    return table


def advice_table(plan: Plan) -> Table:
    """Answers with the numbers that decided."""
    table = _table("Advice", "question", "answer, numbers, source", left=2)
    for each in plan.advice:
        numbers = "; ".join(f"{name}: {number(value)}" for name, value in each.numbers.items())
        table.add_row(each.question, f"{each.answer}\n[dim]{_plain(numbers)}\n({_plain(each.source)})[/dim]")
    return table


def rule_table(plan: Plan) -> Table:
    """Rules of thumb beside what they come to."""
    table = _table("Rules of thumb, and what they come to here", "rule", "says", "is", "because", left=1)
    table.columns[3].justify = "left"
    for each in plan.rules_of_thumb:
        table.add_row(each.rule, each.claimed, each.computed, each.verdict)
    return table


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


# ---------------------------------------------------------------------------------------------- picture


def bars(plan: Plan) -> list[tuple[str, Memory]]:
    """What the picture shows: the plan, and the changes that would lower its memory, the gentlest first."""
    return [("as asked for", plan.memory), *[(each.what, each.memory) for each in plan.remedies[: MOST_BARS - 1]]]


def picture(plan: Plan) -> bytes:
    """A PNG: a bar for the plan, one for each change alone, by part, and a line at what a rank has.

    Raises ImportError where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib, which is not installed; pip install 'equipoise[plot]'") from error
    shown = bars(plan)
    figure = Figure(figsize=(10.0, 1.9 + 0.42 * len(shown)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw(axes, [memory for _, memory in shown])
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=9)
    axes.invert_yaxis()
    _words(axes, plan)
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes: Any, memories: Sequence[Memory]) -> None:
    for part in _present(memories):
        sizes = [memory.parts[part] / GIB for memory in memories]
        before = [sum(memory.parts[p] for p in PARTS[: PARTS.index(part)]) / GIB for memory in memories]
        axes.barh(range(len(memories)), sizes, 0.62, left=before, color=COLOURS[part], label=part)
    for row, memory in enumerate(memories):
        axes.text(memory.total / GIB, row, f"  {gib(memory.total)}", va="center", fontsize=9, color=INK, bbox=PAPER)


def _present(memories: Iterable[Memory]) -> list[str]:
    found = list(memories)
    most = max(memory.total for memory in found)
    return [part for part in PARTS if any(memory.parts[part] > most / 500 for memory in found)]


def _words(axes: Any, plan: Plan) -> None:
    title = f"{plan.model.name}: memory of one of {plan.setup.mesh.ranks} ranks"
    title += ", and with one change each" if plan.remedies else f", at its fullest: {plan.memory.moment}"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("GiB")
    axes.margins(x=0.12)
    if plan.limit is not None:
        axes.axvline(plan.limit / GIB, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        top = axes.get_xaxis_transform()
        axes.text(plan.limit / GIB, 1.0, f" {gib(plan.limit)}", transform=top, va="top", fontsize=9, color=INK)
    axes.legend(
        frameon=False, fontsize=8, ncols=5, loc="upper left", bbox_to_anchor=(0, -0.12 - 0.6 / len(axes.patches))
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
