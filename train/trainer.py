"""The run, from start to finish. Read this first."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.faults import StorageError
from data_pipeline.loader import MicroBatch
from data_pipeline.manifest import DataError, Manifest
from data_pipeline.order import Order
from train.auto_micro_batch import settle_micro_batch
from train.checkpoint.format import checkpoint_path, describe, write_final_weights
from train.checkpoint.init_from import begins, load_first_weights
from train.checkpoint.prune import clean_up
from train.checkpoint.resume import lost_steps, restore
from train.checkpoint.saver import Saver
from train.config import Config
from train.engine.batch_norm import RunningStatistics
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.prefetch import Feed
from train.engine.runtime import start_runtime, start_times, stop_runtime
from train.engine.schedule import evaluation_due, learning_rate
from train.guard.agreement import Agreed, Agreement, patience
from train.guard.bad_samples import BadSamples
from train.guard.errors import REMEDY, NotSaved, Stopped, TrainingFailed
from train.guard.rank_store import Store
from train.guard.run_lock import RunLock
from train.guard.signals import stop_signals
from train.guard.skips import Skips
from train.guard.watchdog import Watchdog
from train.tasks.classification.scores import Evaluation, Scores
from train.tasks.classification.task import Classification
from train.telemetry.monitor import Clock, Monitor, SampleRecord, write_config


def train(config: Config, manifest: Manifest, order: Order, output: Path, lock: RunLock | None, *, resume: str, with_changes: bool) -> None:
    """Train `config` in the folder `output` until `train.epochs` (or `train.max_steps`) are done; every rank calls this.

    lock: rank 0's, of `output`. `resume` is "auto", "never" or a checkpoint's path. Raises ConfigError, DataError, StorageError,
    Unavailable, TrainingFailed, NotSaved or Stopped.
    """
    rank, world, guard = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), config.guard
    watchdog = Watchdog(rank, world, guard.timeout.model_dump(), output / "stacks", guard.grace)
    stop_signals.call(lambda: watchdog.stop_by(time.monotonic() + guard.grace))
    try:
        run = Run(config, manifest, order, output, lock, watchdog, resume, with_changes)
        try:
            run.go()
        except (DataError, StorageError, TrainingFailed, NotSaved) as error:
            run.saver.settle(run.monitor)
            run.monitor.event("failed", run.saver.begun, str(error), code=error.exit_code)
            raise
        finally:
            run.monitor.close()
            run.samples.close()
    except Exception as error:
        if hasattr(error, "exit_code"):
            watchdog.close()
        else:
            watchdog.settle()
        raise
    run.engine.destroy()
    stop_runtime()
    watchdog.close()


class Run:
    """One process's part of a run. Everything random is a function of the seed and the step, so `step` is the only state of the loop."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        order: Order,
        output: Path,
        lock: RunLock | None,
        watchdog: Watchdog,
        resume: str,
        with_changes: bool,
    ):
        self.runtime = runtime = start_runtime(patience(config.guard.timeout))
        store = Store()
        watchdog.connect(store)
        notes = runtime.advice(config.train.precision)
        if config.train.micro_batch == "auto":
            config, order, note = settle_micro_batch(config, order, len(manifest.classes), runtime, output, resume)
            notes.append(note)
        self.config, self.manifest, self.order, self.output = config, manifest, order, output
        self.lock, self.watchdog = lock, watchdog
        self.checkpoints = output / "checkpoints"
        notes += clean_up(self.checkpoints) if runtime.is_main else []
        self.share = order.share(runtime.rank, runtime.world)
        self.task = Classification(config, manifest, order, runtime)
        model = self.task.build_model()
        notes += load_first_weights(model, config, manifest, runtime, begins(self.checkpoints, resume))
        flops = self.task.flops_per_image(model) if runtime.device.type == "cuda" else None
        self.engine = Engine(model, config, len(self.share), runtime.device)
        self.statistics = RunningStatistics(self.engine.module)
        self.ema = Ema(self.engine, config.ema.decay) if config.ema.decay else None
        self.restored = restore(self.checkpoints, config, manifest, order, self.engine, self.ema, resume, with_changes)
        self.start, self.evaluation = self.restored.step, Evaluation()
        self.total = config.train.epochs * order.steps_per_epoch
        self.last = max(self.start, min(self.total, config.train.max_steps or self.total))
        about = describe(self.start, config, manifest, self.engine, order.steps_per_epoch, self.restored.began)
        self.saver = Saver(self.checkpoints, about, self.restored.best, self.engine, self.ema, store, config)
        self.agreement = Agreement(runtime.device, config.guard.agree_every)
        self.skips = Skips(config.guard.max_skipped)
        lost = lost_steps(output / "metrics.jsonl", self.start)
        self.monitor = Monitor(output, config, is_main=runtime.is_main, first=self.start, last=self.last, flops_per_image=flops)
        self.bad_samples = BadSamples(config, runtime.rank)
        self.samples = SampleRecord(output, runtime.rank, config.monitor.record_samples)
        if runtime.is_main:
            notes += write_config(output, config)
        for sentence in notes + self.restored.notes:
            self.monitor.say(sentence)
        path, again = self.restored.path, f" ({lost} steps are taken again)" if lost else ""
        what = f"resumed from {path}" if path else f"training {config.model.name} on {config.data.path}"
        alone = " (on one rank there is nothing to partition)" if self.engine.stage != config.zero.stage else ""
        where = f"{runtime.describe()}, ZeRO {self.engine.stage}{alone}, {config.train.precision}"
        text = f"{what}: step {self.start} of {self.last}{again}, {where}, TensorBoard: tensorboard --logdir {output / 'tensorboard'}"
        machine = {"host": socket.gethostname(), "device": runtime.device_name(), "versions": about.versions}
        fields = {"world_size": runtime.world, "zero_stage": self.engine.stage, "lost_steps": lost, **start_times(lock), **machine}
        fields |= {"last": self.last, "steps_per_epoch": order.steps_per_epoch}
        self.monitor.event("resume" if path else "start", self.start, text, **fields)

    def go(self) -> None:
        """All of it: until the last step, or until somebody asks to stop."""
        self.agreement.round(stop_signals.received)
        self.obey(self.agreement.close(), self.start)
        info = self.restored.info
        if info and info.top1 is None and self.evaluation_due(self.start):  # it was stopped before it had been evaluated
            self.evaluate(self.start)
            self.save(self.start)
        step = self.start
        while step < self.last:
            step = self.train_from(step)
        self.finish()

    def train_from(self, start: int) -> int:
        """The loop: step after step from `start`. Returns the step that comes next: `last`, or that of a checkpoint to go back to."""
        config, order, task, engine, clock, agreement = self.config, self.order, self.task, self.engine, Clock(), self.agreement
        with Feed(task.batches(start), task.inputs, self.runtime.device, clock.waited) as feed:
            for step in range(start, self.last):
                done, ids = step + 1, []
                self.watchdog.enter("first_step" if step == start else "step", done)
                losses = torch.zeros(order.micro_batches, dtype=torch.float64, device=self.runtime.device)
                self.statistics.begin()
                for index in self.share:
                    with agreement.alone():
                        batch, images, targets = next(feed)
                    self.bad_samples.meet("train", done, batch)
                    if step % order.steps_per_epoch == 0 and index == 0:
                        self.monitor.images(step, images)
                    with agreement.alone(engine.stage < 3):  # ZeRO 3 gathers weights as it goes
                        loss = task.loss(engine, batch, images, targets)
                    engine.backward(loss)
                    self.statistics.add()
                    feed.prepare()
                    losses[index] = loss.detach()
                    ids += batch.ids.tolist()
                    result = engine.step(learning_rate(config, step, order.steps_per_epoch))
                self.statistics.finish(result.skipped)
                if self.ema:
                    self.ema.update(step, result.skipped)
                self.skips.add(done, result.skipped)
                report = done % config.train.log_every == 0 or done in (start + 1, self.last)
                # Only where something is written does the host wait for this step's end; else for the one's before it.
                self.tell_skipped(done if report or self.evaluation_due(done) or self.checkpoint_due(done) else done - 1)
                if self.skips.too_many:
                    return self.go_back()
                clock.finish_step()

                self.samples.write(done, ids)
                self.monitor.advance()
                if report:
                    self.report(done, losses, result.grad_norm, clock)
                began = time.perf_counter()
                self.obey(agreement.round(stop_signals.received), done)
                better = self.evaluation_due(done) and self.evaluate(done)
                if better or self.checkpoint_due(done):
                    self.save(done)
                self.saver.tell(self.monitor)
                clock.skip(time.perf_counter() - began)
        return self.last

    def tell_skipped(self, done: int) -> None:
        for step in self.skips.known(done):
            self.monitor.event("skipped_step", step, f"step {step} skipped: its gradient is not finite (or overflowed in fp16)")
        self.watchdog.completed = done

    def report(self, done: int, losses: torch.Tensor, grad_norm: torch.Tensor, clock: Clock) -> None:
        """Metrics of the step just finished: its mean loss over all micro-batches of all ranks."""
        sums = torch.cat([losses, losses.new_tensor([self.bad_samples.new])])
        dist.all_reduce(sums)  # each loss is zero on all ranks but one: the same sum on any number of ranks
        loss, bad, norm = torch.stack([sums[:-1].mean(), sums[-1], grad_norm.to(sums)]).tolist()
        lr = learning_rate(self.config, done - 1, self.order.steps_per_epoch)
        self.monitor.train(done, done / self.order.steps_per_epoch, loss, lr, norm, *clock.read())
        if bad:
            self.bad_samples.agree(self.monitor)

    def go_back(self) -> int:
        """Load the newest checkpoint because too many steps in a row were skipped; returns its step."""
        steps = self.skips.in_a_row
        self.watchdog.enter("save", steps[-1])
        self.saver.finish(self.monitor)
        sentence = self.skips.go_back()
        restored = restore(self.checkpoints, self.config, self.manifest, self.order, self.engine, self.ema, "auto", True)
        if restored.path is None:
            raise TrainingFailed(f"{sentence}, and there is no checkpoint to go back to; {REMEDY}")
        self.saver.go_back(restored.step, restored.best)
        self.evaluation = Evaluation()
        self.monitor.event("rollback", steps[-1], f"{sentence}: back to {restored.path}", steps=steps, to=restored.step)
        return restored.step

    def obey(self, agreed: Agreed, done: int) -> None:
        """What the ranks agreed on after step `done`: to stop, or that a rank is slow."""
        for rank, own, median in agreed.slow:
            text = f"rank {rank} is slow: {own:.2f} s of its own a step, the median rank {median:.2f} s"
            self.monitor.event("slow_rank", done, text, rank=rank, seconds=own, median=median)
        if not agreed.stop:
            return
        rank, number = agreed.stop[0]
        self.tell_skipped(done)
        if done != self.saver.begun:
            self.save(done)
        self.watchdog.enter("save", done)
        self.saver.finish(self.monitor)
        saved = self.saver.saved
        lost = f"; {done - saved} steps are lost, because the save failed" if saved != done else ""
        text = f"stopped after step {done} (rank {rank} got {number.name}); started again, the run goes on from step {saved}{lost}"
        self.monitor.event("preempted", done, text, signal=number.name, rank=rank)
        raise Stopped(text)

    def evaluation_due(self, done: int) -> bool:
        return self.task.has_validation and evaluation_due(self.config.train, done, self.order.steps_per_epoch)

    def checkpoint_due(self, done: int) -> bool:
        return done == self.last or done % (self.config.checkpoint.every_steps or self.order.steps_per_epoch) == 0

    def evaluate(self, done: int) -> bool:
        """Score the weights and their EMA; returns whether they are better than those of every checkpoint."""

        def meet(batch: MicroBatch) -> None:
            """Called before every batch, by all ranks."""
            self.watchdog.enter("evaluation", done)
            self.bad_samples.meet("val", done, batch)
            agreed = self.agreement.round(stop_signals.received)
            if agreed.stop:
                raise _AskedToStop(agreed)

        try:
            scores = {"model": self.score(done, "model", meet)}
            if self.ema:
                with self.ema.swapped_in():
                    scores["ema"] = self.score(done, "ema", meet)
        except _AskedToStop as asked:
            self.obey(asked.agreed, done)
        self.evaluation = Evaluation(done, scores)
        self.bad_samples.agree(self.monitor)
        self.obey(self.agreement.close(), done)
        return self.saver.improves(self.evaluation.top1(done))

    def score(self, done: int, weights: str, meet: Callable[[MicroBatch], None]) -> Scores:
        began = time.perf_counter()
        scores = self.task.evaluate(self.engine, meet, self.output / "evaluations" / f"{weights}.json", done)
        self.monitor.evaluation(done, done / self.order.steps_per_epoch, weights, scores, seconds=time.perf_counter() - began)
        return scores

    def save(self, done: int) -> None:
        """Begin to write a checkpoint of the state after `done` steps; the run's last one is waited for."""
        self.watchdog.enter("save", done)
        if self.lock:
            self.lock.check()  # flock does not reach other nodes on every file system
        self.saver.save(done, self.evaluation.top1(done), self.monitor)
        if done == self.last:
            self.saver.finish(self.monitor)
            if self.saver.saved != done:
                raise NotSaved(f"the last checkpoint, of step {done}, was not written ({self.saver.failure}): mend that, and start again")

    def finish(self) -> None:
        """Write `model.safetensors` from the last checkpoint, and the final scores."""
        self.agreement.close()
        if self.runtime.is_main:
            write_final_weights(self.output, checkpoint_path(self.checkpoints, self.last), "ema" if self.ema else "model")
        self.monitor.finish(self.evaluation.step, self.evaluation.scores)
        self.monitor.event("finished", self.last, f"finished {self.last} steps: {self.output / 'model.safetensors'}")


class _AskedToStop(Exception):
    """Leaves an evaluation, so that the model's own weights are in place again before anything else is done."""

    def __init__(self, agreed: Agreed):
        self.agreed = agreed
