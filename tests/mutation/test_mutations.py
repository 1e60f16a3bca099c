"""The suite notices every mistake of the table; and the runner takes nothing else for a mistake that was noticed."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.mutation.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
LIMIT = ("tests/layer/test_capacity.py::test_limit_is_the_reference_capacity",)
RUN = """
import json, sys
from tests.mutation import forks, mutants
forks.warm()
jobs = [mutants.Mutant(**each) for each in json.load(sys.stdin)]
print(json.dumps({each.name: vars(each) for _, each in forks.run_jobs([(job, job.tests) for job in jobs])}))
"""


def python(*arguments, text=""):
    """A new process: this one has imported equipoise, and a fork of it would test that."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, input=text, capture_output=True, text=True, check=False
    )


# ---------------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def outcomes():
    done = python("-m", "tests.mutation.run", "--json")
    assert done.stdout, done.stderr
    return {outcome["name"]: outcome for outcome in json.loads(done.stdout)}


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_is_noticed(name, outcomes):
    outcome = outcomes[name]
    assert outcome["status"] == "killed", outcome


def test_the_table_is_large_and_names_are_unique():
    assert len(MUTANTS) >= 40
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []


def test_the_written_table_is_that_of_the_code():
    page = (ROOT / "docs" / "mutations.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    written = [(row[0].removeprefix("| "), row[1].strip("`"), row[2]) for row in rows]
    assert written == [(mutant.name, mutant.file, mutant.why) for mutant in MUTANTS]
    assert all(row[3].startswith("tests/") for row in rows)


# ---------------------------------------------------------------------------------------------- the runner


def mutant(name, old, new, tests=LIMIT):
    return Mutant(name, "layer/capacity.py", tests, "", old, new)


def test_only_a_test_that_fails_counts():
    wrong = "math.ceil(fair * (1 - 1e-12))"
    jobs = [
        mutant("noticed", wrong, "int(fair)"),
        mutant("harmless", wrong, "math.ceil(fair * (1 - 2e-12))"),
        mutant("no syntax", wrong, "math.ceil(fair * (1 - 1e-12)"),
        mutant("no import", "import math", "import mathematics"),
        mutant("crashes", wrong, "math.no_such_function(fair)"),
        mutant("no such test", wrong, "int(fair)", ("tests/layer/test_capacity.py::test_no_such",)),
        mutant("no test at all", wrong, "int(fair)", ("tests/mutation/mutants.py",)),
    ]
    done = python("-c", RUN, text=json.dumps([asdict(job) for job in jobs]))
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "noticed": "killed",
        "harmless": "survived",
        "no syntax": "wrong: does not import",
        "no import": "wrong: does not import",
        "crashes": "wrong: crashes",
        "no such test": "wrong: ended with 4",
        "no test at all": "wrong: ended with 5",
    }
    assert outcomes["noticed"]["killer"] == LIMIT[0]
    assert "No module named 'mathematics'" in outcomes["no import"]["message"]
    assert "no_such_function" in outcomes["crashes"]["message"]


@pytest.mark.parametrize(("old", "times"), [("no such line", 0), ("max(", 4)])
def test_a_table_that_no_longer_fits_is_an_error(old, times):
    done = python("-c", RUN, text=json.dumps([asdict(mutant("stale", old, ""))]))
    assert done.returncode == 1
    found = f"stale: expected {old!r} once in layer/capacity.py, found it {times} times; mend the table"
    assert found in done.stderr


def test_a_process_that_has_the_package_already_is_refused():
    done = python("-c", "import equipoise; from tests.mutation import forks; forks.warm()")
    assert "RuntimeError: equipoise is imported already" in done.stderr


def test_a_mutant_that_survives_fails_the_command(tmp_path):
    code = """
import sys
from tests.mutation import mutants, run
wrong = "math.ceil(fair * (1 - 1e-12))"
same = "math.ceil((1 - 1e-12) * fair)"
run.MUTANTS = [
    mutants.Mutant(name, "layer/capacity.py", TESTS, "why", wrong, new)
    for name, new in (("bad", "int(fair)"), ("good", same))
]
sys.argv[1:] = ["--write", PATH]
run.main()
"""
    path = tmp_path / "table.md"
    done = python("-c", code.replace("TESTS", repr(LIMIT)).replace("PATH", repr(str(path))))
    assert done.returncode == 1, done.stderr
    assert "1 of 2 found in" in done.stderr
    assert f"| bad | `layer/capacity.py` | why | {LIMIT[0]} |" in path.read_text()
    assert "| good | `layer/capacity.py` | why | survived |" in path.read_text()


def test_tests_that_fail_without_a_mistake_prove_nothing(tmp_path):
    test = tmp_path / "test_always.py"
    test.write_text("def test_fails():\n    assert False\n")
    code = """
from tests.mutation import mutants, run
run.run_all([mutants.Mutant("any", "layer/capacity.py", TESTS, "", "max_tokens < 1", "max_tokens < 2")], print)
"""
    done = python("-c", code.replace("TESTS", repr((str(test),))))
    assert "ValueError: tests fail on the code as it is" in done.stderr
    assert "::test_fails assert False; mend them first" in done.stderr


def test_a_name_that_no_mutant_has_is_refused():
    done = python("-m", "tests.mutation.run", "--only", "no-such-mutant")
    assert done.returncode == 2
    assert "--only: expected a part of a mutant's name, got no-such-mutant" in done.stderr
