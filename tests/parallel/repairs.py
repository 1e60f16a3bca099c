"""The run that tests/parallel/test_repairs.py breaks and has repaired: the same code for one process and for ranks."""

import json
import os
import sysconfig
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from equipoise.faults import Collapse, NaNExpert, SkewedInput, SlowExpert, SlowRank, StaleCounters
from equipoise.faults.requests import Inject, Remove, open_requests, post
from equipoise.layer.mode import NORMAL
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.monitor.incidents import repairs
from equipoise.parallel import CollectiveError, Ranks
from equipoise.recovery.actions import outcome, take_back
from equipoise.recovery.catalogue import REPAIRS
from equipoise.recovery.swap import digest
from equipoise.routing import SwitchLoss, TopK
from equipoise.train.config import DataConfig, OptimConfig, TrainConfig
from equipoise.train.diagnose import DivergenceError
from equipoise.train.loop import Trainer, load_config
from equipoise.train.report import Silent
from equipoise.train.run import open_data
from equipoise.train.snapshot import pack_optimizer
from equipoise.types import Finding, Team

LAYER, BATCH = "layers.1.mlp", 16
TRAINED, TRIAL, HEALED, END = 40, 48, 60, 66
COLLAPSE = Finding("collapse", LAYER, 5, "critical", 8.0, 2.0, "everything goes to one expert", "")
DEAD = replace(COLLAPSE, rule="dead_experts", expert=3)


def corpus(folder: Path) -> Path:
    """Python's standard library in documents of 2000 characters."""
    stdlib, rows = Path(sysconfig.get_paths()["stdlib"]), []
    for domain, name in (("text", "textwrap.py"), ("text", "csv.py"), ("parsing", "ast.py"), ("parsing", "shlex.py")):
        text = (stdlib / name).read_text(encoding="utf-8")[:16_000]
        rows += [{"text": text[i : i + 2000], "domain": domain} for i in range(0, len(text), 2000)]
    path = folder / "stdlib.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def config(folder: Path) -> TrainConfig:
    """Four micro-batches: what a loss of micro scope sees is the same on one, two and four ranks."""
    moe = MoEConfig(num_experts=8, hidden_dim=32, router=TopK(k=2), balance=(SwitchLoss(coef=1.0),))
    sizes = {"vocab_size": 320, "dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "max_seq_len": 64}
    data = {"vocab_size": 320, "seq_len": 32, "val_fraction": 0.2, "cache_dir": folder}
    every = {"eval_every": 0, "checkpoint_every": 0, "watch_every": 2, "eval_batches": 2}
    return TrainConfig(
        name="test",
        model=DecoderConfig(**sizes, moe=moe),
        data=DataConfig(corpus=str(corpus(folder)), **data),
        optim=OptimConfig(lr=1e-3, warmup=5),
        **{"steps": 200, "batch_size": BATCH, "micro_batch_size": BATCH // 4, "bf16": False, "device": "cpu"},
        **every,
        recover=True,
        accept_faults=True,
    )


def train(folder: Path) -> Path:
    """A healthy run of one process, with a checkpoint that is known to be good."""
    opened, data = open_data(config(folder))
    trainer = Trainer(replace(opened, recover=False, accept_faults=False), data, folder / "healthy", Silent())
    trainer.run(until=TRAINED)
    trainer.repairs._config = opened  # what is kept as known-good comes with stand-ins
    trainer.save()
    trainer.close("interrupted")
    (folder / "healthy" / "config.json").write_text(opened.to_json(), encoding="utf-8")
    return folder / "healthy"


def going_on(out: Path, ranks: Ranks | None) -> Trainer:
    opened, data = open_data(load_config(out))
    return Trainer(opened, data, out, Silent(), resume=True, ranks=ranks)


def ask(out: Path) -> None:
    """To break the run before it goes on."""
    open_requests(out)
    post(out, Inject(Collapse(LAYER, 5, 40.0)))


def story(out: Path, ranks: Ranks | None) -> tuple[dict, Trainer]:
    """What this process did: a collapse, and then a weight that is no number, in one expert."""
    trainer = going_on(out, ranks)
    trainer.run(until=TRIAL)
    trainer.save()
    trainer.close("interrupted")
    trainer = going_on(out, ranks)  # in the middle of a trial
    on_trial = trainer.repairs.recovery.on_trial
    trainer.run(until=HEALED)
    trainer.save()
    told = {"words": words(trainer.spread.team, ranks.rank if ranks else 0)}
    told |= {"on_trial": on_trial and on_trial.kind, "mode": trainer.model.moe_layers[LAYER].mode.to_json()}
    if trainer.spread.is_main:
        post(out, Remove())
        post(out, Inject(NaNExpert(LAYER, 3, seed=1)))
    trainer.run(until=END)
    told["finite"] = all(bool(torch.isfinite(each).all()) for each in trainer.model.parameters())
    if trainer.spread.is_main:
        told |= records(trainer)
    told["undone"] = undone(trainer)
    told["failed"] = fail_on_the_last(trainer)
    told["faults"] = put_in_and_out(trainer)
    told["diverged"] = diverge(trainer)
    return told, trainer


def records(trainer: Trainer) -> dict:
    actions = [(a.step, a.kind, a.layer, a.state) for a in repairs(trainer.store.actions()) if a.step > TRAINED]
    alerts = [(a.step, a.key, a.state) for a in trainer.store.alerts() if a.step > TRAINED]
    losses = [(step, loss) for step, loss, _ in trainer.store.scalar_history("loss") if step > TRAINED]
    return {"actions": actions, "alerts": alerts, "losses": losses}


def fingerprint(trainer: Trainer) -> str:
    """Of every bit that a repair may change, in this process."""
    layers = trainer.model.moe_layers
    modes = [layer.mode.to_json() for layer in layers.values()]
    tensors = dict(trainer.model.state_dict()) | pack_optimizer(trainer.optimizer)[0]
    return json.dumps([modes, trainer.repairs.rate_scale, digest(tensors)])


def undone(trainer: Trainer) -> dict[str, list]:
    """By repair: why it can't be done, whether it changed anything, whether its undo has put back every bit."""
    team, recovery = trainer.spread.team, trainer.repairs.recovery
    for layer in trainer.model.moe_layers.values():
        layer.set_mode(NORMAL)
    patient = replace(recovery.patient, health=recovery._canary.measure(0), seed=7)
    told = {}
    for kind, repair in REPAIRS.items():
        finding = DEAD if kind == "reseed" else COLLAPSE
        shot = shoot(trainer, 3) if kind == "reseed" else {}
        before = fingerprint(trainer)
        apply = partial(repair.apply, patient, finding)
        change, problem = team.together(apply, take_back, partial(outcome, patient))
        during = fingerprint(trainer)
        if change is not None:
            change.undo()
        told[kind] = [problem, before != during, fingerprint(trainer) == before]
        for weight, was in shot.items():
            weight.fill_(was)
    return told


def shoot(trainer: Trainer, expert: int) -> dict[torch.Tensor, float]:
    """One weight of the expert is no number, where it is held: {that weight: what it was}."""
    experts, shot = trainer.model.moe_layers[LAYER].experts, {}
    for place, id_ in enumerate(trainer.spread.team.held(LAYER, experts.num_experts).ids):
        if id_ == expert:
            weight = experts.down_proj.detach()[place, 0, 0]
            shot[weight] = float(weight)
            weight.fill_(torch.nan)
    return shot


class Dies:
    """A policy that ends its process when it is asked for a repair."""

    interim = frozenset()

    def __call__(self, situation):
        os._exit(0)


def put_in_and_out(trainer: Trainer) -> list[list[str]]:
    """The faults that are not of a router or a weight: [those in place, those left when they are taken out]."""
    seconds = 1e-4
    asked = (SlowRank(seconds), SlowExpert(LAYER, 6, seconds), StaleCounters("reset"), SkewedInput(0))
    told = []
    for requests in ([Inject(fault) for fault in asked], [Remove()]):
        for request in requests if trainer.spread.is_main else []:
            post(trainer.out, request)
        trainer.run(until=trainer.step_number + 1)
        told.append([type(fault).__name__ for fault in trainer.faults.in_place])
    return told


def diverge(trainer: Trainer) -> str:
    """A weight on one rank is no number, and nothing may be repaired: what all raise."""
    trainer.repairs.recovery.act = False
    shot = shoot(trainer, 6)
    try:
        trainer.save()
    except DivergenceError as error:
        return str(error)
    finally:
        for weight, was in shot.items():
            weight.fill_(was)
        trainer.repairs.recovery.act = True
    return "nothing"


def lose_the_last(trainer: Trainer) -> str:
    """The last rank dies while a loss that is no number is being repaired; what the others then raise."""
    if trainer.spread.ranks.rank == trainer.spread.size - 1:
        trainer.repairs.recovery.policy = Dies()
    shoot(trainer, 2)
    try:
        trainer.run(until=trainer.step_number + 1)
    except CollectiveError as error:
        return str(error)
    return "nothing"


def words(team: Team, rank: int) -> dict:
    """What ranks tell each other, and what becomes of things that not all of them can do."""
    undone, told = [], {}
    told["main"] = team.tell({"from": rank, "a": [1.5, None, "é"]})
    told["rows"] = team.rows(torch.full((rank, 2), float(rank))).tolist()
    told["same"] = team.same(torch.full((2,), float(rank))).tolist()

    def attempt(do, same=lambda made: "") -> list:
        return list(team.together(do, undone.append, same))

    def refuse(ranks, error=ValueError):
        if rank in ranks:
            raise error(f"not on {min(ranks)}")
        return rank

    told["all"] = attempt(lambda: rank)
    told["none"] = attempt(lambda: refuse(range(99)))
    told["one"] = attempt(lambda: refuse([1], OSError))
    told["differs"] = attempt(lambda: rank, str)
    try:
        attempt(lambda: refuse([1], KeyError))
    except Exception as error:
        told["unforeseen"] = [type(error).__name__, str(error)]
    return told | {"undone": undone}


def fail_on_the_last(trainer: Trainer) -> list:
    """A repair that the last rank can't do, for it has lost its stand-in: [why not, whether it left nothing]."""
    team, patient = trainer.spread.team, trainer.repairs.recovery.patient
    if trainer.spread.size > 1 and trainer.spread.ranks.rank == trainer.spread.size - 1:
        patient = replace(patient, dense={})
    before = fingerprint(trainer)
    apply = partial(REPAIRS["spill"].apply, patient, COLLAPSE)
    change, problem = team.together(apply, take_back, partial(outcome, patient))
    if change is not None:
        change.undo()
    return [problem, fingerprint(trainer) == before]
