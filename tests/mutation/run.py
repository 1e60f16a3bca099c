"""Make each mistake of the table in a copy of the package, and see whether its tests fail: python -m tests.mutation.run

Exits with 0 if every mistake is found. The same tests must pass without any mistake first, or else nothing is shown.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tests.mutation.forks import Job, Outcome, run_jobs, warm
from tests.mutation.mutants import MUTANTS, Mutant


def run_all(mutants: Sequence[Mutant], tell: Callable[[str], object]) -> list[Outcome]:
    """The outcomes in the table's order. Raises ValueError when the tests fail without any mistake."""
    warm()
    nodes: dict[str, set[str]] = {}
    for node in (node for mutant in mutants for node in mutant.tests):
        nodes.setdefault(node.split("::")[0], set()).add(node)
    jobs: list[Job] = [(None, tuple(sorted(found))) for found in nodes.values()]
    outcomes: dict[int, Outcome] = {}
    for number, outcome in run_jobs([*jobs, *((mutant, mutant.tests) for mutant in mutants)]):
        outcomes[number] = outcome
        unbroken = number < len(jobs)
        name = f"without a mistake, {list(nodes)[number]}" if unbroken else outcome.name
        tell(f"{len(outcomes)}/{len(jobs) + len(mutants)} {name}: {outcome.status} ({outcome.seconds} s)")
        if unbroken and outcome.status != "survived":
            raise ValueError(f"tests fail on the code as it is: {outcome.killer} {outcome.message}; mend them first")
    return [outcomes[len(jobs) + number] for number in range(len(mutants))]


def main() -> None:
    """Run, print, and exit with 1 unless every mutant is killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__)
    parser.add_argument("--only", default="", help="mutants with one of these in the name, separated by commas")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON; progress goes to stderr")
    parser.add_argument("--write", metavar="PATH", help="write the table as Markdown")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if any(part in mutant.name for part in options.only.split(","))]
    if not mutants:
        parser.error(f"--only: expected a part of a mutant's name, got {options.only}")
    start = time.monotonic()
    outcomes = run_all(mutants, lambda line: print(line, file=sys.stderr, flush=True))
    killed = sum(outcome.status == "killed" for outcome in outcomes)
    summary = f"{killed} of {len(mutants)} found"
    if options.write:
        Path(options.write).write_text(markdown(mutants, outcomes, summary), encoding="utf-8")
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    else:
        for outcome in outcomes:
            print(f"{outcome.name:28} {outcome.status:10} {outcome.killer} {outcome.message}")
    print(f"{summary} in {time.monotonic() - start:.0f} s", file=sys.stderr)
    sys.exit(killed < len(mutants))


def markdown(mutants: Sequence[Mutant], outcomes: Sequence[Outcome], summary: str) -> str:
    """The page docs/mutations.md."""
    rows = [
        f"| {mutant.name} | `{mutant.file}` | {mutant.why} | {outcome.killer.split('[')[0] or outcome.status} |"
        for mutant, outcome in zip(mutants, outcomes, strict=True)
    ]
    head = (
        "# Mutations\n\nDoes the suite notice when the code is wrong? Each line is one small mistake, made on purpose "
        "in a copy of the package, and the first test that fails then. The same tests pass without it.\n\n"
        f"{summary}: `{' '.join(['python', '-m', 'tests.mutation.run', *sys.argv[1:]])}`, {datetime.now(UTC):%Y-%m-%d}."
        "\n\n| mistake | in | what is wrong | found by |\n| --- | --- | --- | --- |\n"
    )
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
