"""The training loop: one step, and what happens every so many.

Read `Trainer.step` first. Everything else opens the run folder, goes on from a checkpoint, or reports.
A run folder holds config.json, run.sqlite, checkpoints/step-N/.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from equipoise.disk.atomic import atomic_write
from equipoise.disk.checkpoint import (
    CHECKPOINTS,
    clean_leftovers,
    latest_checkpoint,
    newest_folder,
    prune_checkpoints,
)
from equipoise.faults import FaultDesk
from equipoise.layer import reduce_and_update
from equipoise.models.decoder import Decoder
from equipoise.models.device import pick_device
from equipoise.models.run_files import CONFIG
from equipoise.monitor.alerts import still_firing
from equipoise.monitor.rules import CountRule
from equipoise.monitor.store import RunStore
from equipoise.monitor.watch import Watch
from equipoise.parallel import CollectiveError, Ranks
from equipoise.train.absent import NoRepairs, NoStore, NoTuning
from equipoise.train.config import TrainConfig
from equipoise.train.data import Batch, Loader, TokenData, eval_batches
from equipoise.train.diagnose import DivergenceError, first_non_finite, non_finite_parameter
from equipoise.train.evaluate import Evaluation, evaluate
from equipoise.train.finetune.tuning import Tuning
from equipoise.train.hash_tables import fit_hash_tables
from equipoise.train.interference import interference
from equipoise.train.optim import learning_rate
from equipoise.train.repair import Repairs
from equipoise.train.report import Reporter, sentence
from equipoise.train.self_contained import keep_with_run
from equipoise.train.specialisation import Specialisation, check_domains, route_text, specialisation
from equipoise.train.spread import Alone, OverRanks, Spread, check_ranks
from equipoise.train.state import RunState
from equipoise.train.step import gradients
from equipoise.types import Action, Alert, Sink


class Trainer:
    """A training run in a folder.

    config: with the vocabulary of data.tokenizer. out: the run folder. resume: go on from its newest whole checkpoint.
    sinks: get what the store gets of windows, alerts and repairs, and after a resume the alerts that still fire.
    ranks: the processes that it is spread over, of which this is one; None for one process.
    Raises ValueError when `out` holds a run already and resume is off, or none and resume is on.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TokenData,
        out: Path,
        reporter: Reporter,
        resume: bool = False,
        sinks: Sequence[Sink] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.data, self.out, self.reporter = config, data, out, reporter
        self.checkpoints = out / CHECKPOINTS
        check_ranks(config, ranks)
        is_main = ranks is None or ranks.is_main
        torch.manual_seed(config.seed)
        self.device = pick_device(config.device if ranks is None else ranks.mesh.device_type)
        self.model = Decoder(config.model).to(self.device)
        fit_hash_tables(self.model, data.train)
        fresh = not (resume and newest_folder(self.checkpoints))
        self.tuning = _tuning(config, self.model, data, out, fresh)
        self.spread: Spread = Alone(self.tuning.parameters()) if ranks is None else OverRanks(self.model, ranks)
        self.optimizer = self.tuning.optimizer(config.optim)
        self.loader = Loader(data.train, config.batch_size, config.data.seq_len, config.seed)
        eval_batches(data.val, config.batch_size, config.data.seq_len)  # too little text is an error now, not later
        if config.specialisation:
            check_domains(data.val, config.batch_size, config.data.seq_len, config.eval_batches)
        self._store: RunStore | NoStore = _open_store(config, out, resume) if is_main else NoStore()
        if isinstance(self._store, RunStore):  # the main rank's
            self.reporter.follow(self._store)
            keep_with_run(out, config, data)
            for text in self.tuning.keep(out) if fresh else ():
                self.reporter.say(text)
        per_flush = config.watch_every * config.batch_size * config.data.seq_len
        told, rules = (self._store, *sinks), (CountRule(per_flush), *self.tuning.rules)
        self.watch = Watch(self.model, every=config.watch_every, rules=rules, sinks=told, reduce=self.spread.reduce)
        if self.tuning.baselines:
            self.watch.use_baselines(self.tuning.baselines)
        if config.co_select:
            self.watch.co_select(config.co_select)
        self.faults, self.repairs = self._desk(), self._repairs(told)
        parts = (self.model, self.optimizer, self.loader, self.watch, self.repairs, self.tuning)
        self._state = RunState(*parts)
        self.step_number = 0
        self._clock = (time.perf_counter(), 0)  # when the speed was last taken, and at which step
        try:
            if resume:
                self._resume()
                self._hand_over(sinks)
            if fresh:
                self._keep_base()
        except BaseException:
            self.close("failed")
            raise

    def _desk(self) -> FaultDesk | None:
        if not self.config.accept_faults:
            return None
        return FaultDesk(self.out, self.model, self.show_text, self.watch.recorder, self.spread.team)

    def _repairs(self, told: Sequence[Sink]) -> Repairs | NoRepairs:
        """A dense model is trained by the same loop; and what FSDP2 has sharded is not repaired."""
        if not self.model.routed_layers or not self.spread.repairable:
            return NoRepairs()
        return Repairs(self.config, self.model, self.optimizer, self.data, self.out, self.watch, told, self.spread)

    @property
    def store(self) -> RunStore:
        """The run's records; on the main rank only."""
        assert isinstance(self._store, RunStore)
        return self._store

    def run(self, until: int | None = None, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end, or to step `until`, or until `stop()`. Returns whether it got there.

        Stopping writes a checkpoint. Raises DivergenceError when the loss is no longer finite.
        """
        until = self.config.steps if until is None else min(until, self.config.steps)
        while self.step_number < until:
            try:
                if self.spread.any(stop()):
                    self.save()
                    return False
                self.step()
            except CollectiveError as error:
                raise CollectiveError(f"step {self.step_number + 1}: {error}") from error
        return True

    def step(self) -> None:
        """One optimizer step, and whatever is due after it."""
        step, config = self.step_number + 1, self.config
        batch = self._next_batch()
        self.tuning.begin(step)
        parts = self.spread.parts(batch, config.num_micro_batches)
        measured = self._interference(parts, step)
        own_loss = gradients(self.model, parts, step, config.bf16, self.watch.recorder, self.spread.reduce)
        self.tuning.pull()
        loss, grad_norm = self.spread.total(own_loss), self.spread.clip(config.optim.clip)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._rescue(step, f"loss is {loss}, gradient norm is {grad_norm}", lambda: self._where(batch))
        rate = self._set_learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tuning.push()
        reduce_and_update(self.model.routed_layers.values(), self.spread.reduce, step=step)
        self.step_number = step
        measured |= self.tuning.compare(step, self.watch.recorder)
        with self._store.transaction():
            self._record({"loss": loss, "grad_norm": grad_norm, "learning_rate": rate} | measured)
            changed = self.watch.step(step)
        self._tell(changed)
        if self.watch.is_due(step):
            self._tell(self.repairs.after_flush(step, changed))
        for text in self.faults.step() if self.faults is not None else ():
            self.reporter.say(f"step {step}: {text}")
        self.reporter.update()
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:  # the end is the caller's
            self.evaluate()
        if (config.checkpoint_every and step % config.checkpoint_every == 0) or step == config.steps:
            self.save()

    def evaluate(self) -> Evaluation:
        """Validate now, and keep the result in the store."""
        config = self.config
        sizes = (config.batch_size, config.data.seq_len, config.eval_batches)
        with self.watch.recorder.paused():
            result = evaluate(self.model, self.data.val, *sizes, config.bf16, self.spread)
        self._store.scalars(self.step_number, result.scalars())
        self.reporter.say(
            f"step {self.step_number}: validation perplexity {result.perplexity:.1f}, "
            f"{result.bits_per_byte:.3f} bits per byte"
        )
        self._clock = (time.perf_counter(), self.step_number)
        return result

    def specialisation(self) -> list[Specialisation]:
        """How the routers divide the domains of the validation text now; keeps the result in the store."""
        config = self.config
        with self.watch.recorder.paused():
            text = route_text(
                self.model, self.data.val, config.batch_size, config.data.seq_len, config.eval_batches, config.bf16
            )
        layers = specialisation(text)
        self._store.scalars(
            self.step_number, {name: value for layer in layers for name, value in layer.scalars().items()}
        )
        return layers

    def save(self) -> Path:
        """Write a checkpoint of this moment, and drop the oldest beyond keep_checkpoints.

        Raises DivergenceError, and writes none, when a weight is not finite and no repair helps: the loss will show it
        a step later.
        """
        if where := self.spread.first(non_finite_parameter(self.model)):
            self._rescue(self.step_number, "the weights are not finite after the update", lambda: str(where))
        path = self.spread.save(self.checkpoints, self.step_number, self._state.content(), self.optimizer)
        self.tuning.saved(self.out)
        if refused := self.repairs.remember(self.step_number, path):
            self.reporter.say(refused)
        if self.spread.is_main:
            protect = [self.checkpoints / name for name in self.repairs.protected()]
            prune_checkpoints(self.checkpoints, self.config.keep_checkpoints, protect)
        self._clock = (time.perf_counter(), self.step_number)
        return path

    def close(self, status: str) -> None:
        """Detach what observes the model and close the store. status: "finished", "interrupted" or "failed"."""
        self.watch.detach()
        self.repairs.detach()
        if self.faults is not None:
            self.faults.close()
        try:
            self._store.set_meta(status=status)
            self.reporter.update()
        finally:
            self._store.close()

    def _next_batch(self) -> Batch:
        """The loader's, unless a fault of the data is in place."""
        batch = self.loader.next_batch().to(self.device)
        rows = None if self.faults is None else self.faults.rows(batch.domains_BS)
        if rows is None:
            return batch
        return Batch(batch.tokens_BS[rows], batch.targets_BS[rows], batch.domains_BS[rows])

    def show_text(self) -> None:
        """A forward on validation text, for a fault that wants to see a layer's inputs."""
        config = self.config
        batches = eval_batches(self.data.val, config.batch_size, config.data.seq_len, max_batches=1)
        with self.watch.recorder.paused(), torch.no_grad():
            self.model(next(batches).tokens_BS.to(self.device))

    def _tell(self, changes: Sequence[Alert | Action]) -> None:
        for change in changes:
            self.reporter.say(f"step {change.step}: {sentence(change)}")

    def _rescue(self, step: int, what: str, where: Callable[[], str]) -> None:
        """A number is no longer one: repair the model and go on without this gradient, or raise DivergenceError."""
        done = self.repairs.rescue(step)
        self._tell(done)
        if not done or done[-1].state != "kept":
            raise self._diverged(step, what, where())
        self.optimizer.zero_grad(set_to_none=True)  # the optimizer passes over parameters without a gradient
        for layer in self.model.routed_layers.values():
            for state in layer.adaptive:
                state.pending.zero_()

    def _set_learning_rate(self, step: int) -> float:
        rate = self.repairs.rate_scale * learning_rate(self.config.optim, step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate

    def _record(self, values: dict[str, float]) -> None:
        since, step = self._clock
        if self.step_number % self.config.watch_every == 0 and self.step_number > step:
            tokens = (self.step_number - step) * self.config.batch_size * self.config.data.seq_len
            now = time.perf_counter()
            values = values | {"tokens_per_s": tokens / (now - since)} | self.spread.scalars(now - since)
            self._clock = (now, self.step_number)
        self._store.scalars(self.step_number, values)

    def _interference(self, parts: list[Batch], step: int) -> dict[str, float]:
        """Balancing against task gradients on this step's batch, where it is due. Training does not notice."""
        every = self.config.interference_every
        if every == 0 or step % every:
            return {}
        layers = interference(self.model, [parts], step, self.config.bf16, self.watch.recorder)
        self._clock = (time.perf_counter(), self.step_number)  # not part of the speed
        return {name: value for layer in layers for name, value in layer.scalars().items()}

    def _resume(self) -> None:
        if self.spread.is_main:
            clean_leftovers(self.checkpoints)
        path = newest_folder(self.checkpoints)  # a damaged one is an error: not to be passed over in silence
        if path is None:
            self.reporter.say(f"{self.out} has no checkpoint yet: starting from step 0")
            self._store.truncate_after(0)
            self.repairs.forget_after(0)
            return
        step = self._state.restore(path, self.spread)
        self.step_number = step
        self._store.truncate_after(step)
        if not self.repairs.remembers(step):
            self.repairs.remember(step, path)  # killed between the checkpoint and its record, or refused
        self._clock = (time.perf_counter(), self.step_number)
        self.reporter.say(f"resumed from {path}")

    def _keep_base(self) -> None:
        """What a model is tuned from, as the first thing that is known to be good, and how it does on held-out text."""
        if self.config.finetune is not None:
            self._store.scalars(0, self.tuning.compare(0, self.watch.recorder))
            self.save()

    def _hand_over(self, sinks: Sequence[Sink]) -> None:
        """Tell what is still firing to those who may have forgotten it since, a pager that timed out say.

        As it was when it fired: then labels and keys are the same.
        """
        for alert in still_firing(self._store.alerts()):
            for sink in sinks:
                sink.alert(alert)

    def _where(self, batch: Batch) -> str:
        with self.watch.recorder.paused():
            return first_non_finite(self.model, lambda: self.model(batch.tokens_BS), self.spread.first)

    def _diverged(self, step: int, what: str, where: str) -> DivergenceError:
        last = latest_checkpoint(self.checkpoints)
        return DivergenceError(
            f"step {step}: {what}. First not finite: {where}. The last good checkpoint is {last or 'none'}. Lower "
            "optim.lr or raise optim.warmup, and go on from the checkpoint with --resume, or start again with another "
            "--seed"
        )


def _tuning(config: TrainConfig, model: Decoder, data: TokenData, out: Path, fresh: bool) -> Tuning | NoTuning:
    return NoTuning(model) if config.finetune is None else Tuning(config, model, data, out, fresh=fresh)


def _open_store(config: TrainConfig, out: Path, resume: bool) -> RunStore:
    """The run's store, with config.json beside it."""
    path = out / CONFIG
    if path.exists() and not resume:
        raise ValueError(f"out: {out} already holds a run; go on with --resume, or choose another --out")
    if resume and not path.exists():
        raise ValueError(f"out: {out} holds no run to resume (no config.json); leave out --resume, or check the path")
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        with atomic_write(path) as file:
            file.write(config.to_json().encode())
    store = RunStore(out)
    store.set_meta(name=config.name, total_steps=config.steps, status="running")
    return store


def load_config(out: Path) -> TrainConfig:
    """The configuration of the run in a folder. Raises ValueError when there is none or it is damaged."""
    path = out / CONFIG
    if not path.is_file():
        raise ValueError(f"out: {out} holds no run to resume (no config.json); leave out --resume, or check the path")
    return TrainConfig.from_json(path.read_text(encoding="utf-8", errors="replace"))
