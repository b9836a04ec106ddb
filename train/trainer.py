"""The run, from start to finish. Read this first."""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.faults import StorageError
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.randomness import Stream, make_key
from data_pipeline.split import DataError
from train.checkpoint.format import write_final_weights
from train.checkpoint.info import checkpoint_path
from train.checkpoint.resume import restore
from train.checkpoint.resume_point import Resume
from train.config import Config
from train.engine.prefetch import Prefetcher
from train.engine.runtime import leave_after, stop_runtime
from train.engine.schedule import learning_rate
from train.evaluator import AskedToStop
from train.guard.errors import NotSaved, StateLost, Stopped, TrainingFailed, no_way_back
from train.guard.guard import Guard, StopRequest
from train.guard.run_lock import RunLock
from train.run_parts import RunParts
from train.telemetry.metrics import Evaluation
from train.telemetry.monitor import Clock


def train(config: Config, manifest: Manifest, order: Order, output: Path, lock: RunLock | None, resume: Resume) -> None:
    """Train `config` in the folder `output` to the end of the run, or to `train.max_steps`; every rank calls this.

    lock: rank 0's, of `output`. Raises ConfigError, DataError, StorageError, Unavailable, TrainingFailed, StateLost,
    NotSaved or Stopped.
    """
    guard = Guard(config.guard, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), output / "stacks")
    try:
        run = Run(config, manifest, order, output, lock, guard, resume)
        try:
            run.go()
        except (DataError, StorageError, TrainingFailed, StateLost, NotSaved) as error:
            run.saver.wait_and_report(run.monitor)
            run.monitor.event("failed", run.saver.begun, str(error), code=error.exit_code)
            raise
        finally:
            run.close()
    except BaseException as error:
        guard.close(error)
        leave_after(error)
        raise
    run.engine.destroy()
    stop_runtime()
    guard.close()


class Outcome(NamedTuple):
    """What a step found.

    losses: as from Task.new_losses, on the device; zero in other ranks' columns. ids: of this rank's samples.
    """

    losses: Tensor
    grad_norm: Tensor
    ids: list[int]


class Run(RunParts):
    """One process's part of a run.

    Everything random is a function of the seed and the step, so `step` is the only state of the loop.
    """

    def go(self) -> None:
        """The whole run: until the last step, or until a stop is requested."""
        self.guard.agree(self.start)
        self.stop_if_asked(self.guard.collect_pending(self.start), self.start)
        # The run was stopped after this step, before its evaluation; or it begins with a checkpoint of another folder,
        # and its own shall have what a later start, or going back, needs.
        info, elsewhere = self.restored.info, self.restored.elsewhere
        if unscored := info and (info.score is None or elsewhere) and self.evaluation_due(self.start):
            self.evaluate(self.start)
        if unscored or elsewhere:
            self.save(self.start)
        step = self.start
        while self.must_go_back or step < self.last:
            step = self.go_back(step) if self.must_go_back else self.train_from(step)
        self.finish()

    def train_from(self, start: int) -> int:
        """The loop: steps from `start` to `last`, or until the run must go back. Returns the step that it reached."""
        clock, guard, device = Clock(), self.guard, self.runtime.device
        with Prefetcher(self.batches(start), self.inputs, device, clock.waited, guard.waited) as batches:
            for step in range(start, self.last):
                self.guard.enter("first_step" if step == start else "step", step + 1)
                outcome = self.train_step(step, batches)
                done = step + 1
                log = done % self.config.train.log_every == 0 or done in (start + 1, self.last)
                # Synchronise with this step only if it logs, evaluates or saves; otherwise with the previous one.
                due = log or self.evaluation_due(done) or self.checkpoint_due(done)
                self.guard.wait_for(done if due else step)
                if self.must_go_back:
                    return step
                clock.finish_step()
                self.monitor.advance()
                self.samples.write(done, outcome.ids)
                if log:
                    self.report(done, outcome, clock)
                with clock.paused():
                    self.stop_if_asked(self.guard.agree(done), done)
                    better = self.evaluation_due(done) and self.evaluate(done)
                    if better or self.checkpoint_due(done):
                        self.save(done)
                    self.saver.report(self.monitor)
        return self.last

    def train_step(self, step: int, batches: Prefetcher) -> Outcome:
        """One optimizer step: this rank's micro-batches forward and backward, then the update."""
        config, order, engine, guard = self.config, self.order, self.engine, self.guard
        losses, ids = self.task.new_losses(order.micro_batches, self.runtime.device), []
        self.statistics.begin()
        for index in self.share:
            batch, inputs = next(batches)
            guard.bad_samples.meet("train", step + 1, batch)
            if step % order.steps_per_epoch == 0 and index == 0:
                self.monitor.images(step, functools.partial(self.task.preview, inputs))
            torch.manual_seed(make_key(config.train.seed, Stream.MODEL, step, index))  # for the model's dropout
            with guard.local_work(engine.gradients_here):  # DeepSpeed's own backward pass needs the other ranks
                losses[:, index] = engine.accumulate(inputs)
            self.statistics.add()
            batches.prepare()
            ids += batch.ids.tolist()
            result = engine.step(learning_rate(config, step, order.steps_per_epoch))
        self.statistics.finish(result.skipped)
        if self.ema:
            self.ema.update(step, result.skipped)
        guard.step_queued(step + 1, result.skipped)
        return Outcome(losses, result.grad_norm, ids)

    def report(self, done: int, outcome: Outcome, clock: Clock) -> None:
        """Metrics of the step just finished: its mean losses over all micro-batches of all ranks."""
        bad_samples = self.guard.bad_samples
        sums = torch.cat([outcome.losses.view(-1), outcome.losses.new_tensor([bad_samples.new])])
        dist.all_reduce(sums)  # each loss is zero on all ranks but one: the same sum on any number of ranks
        means = [losses.mean() for losses in sums[:-1].view(outcome.losses.shape)]
        *means, bad, norm = torch.stack([*means, sums[-1], outcome.grad_norm.to(sums)]).tolist()
        losses = dict(zip(self.task.loss_names(), means, strict=True))
        lr = learning_rate(self.config, done - 1, self.order.steps_per_epoch)
        self.monitor.train(done, self.epoch(done), losses, lr, norm, *clock.read())
        if bad:
            bad_samples.agree(self.monitor)

    def go_back(self, reached: int) -> int:
        """Load the newest checkpoint; returns its step."""
        steps, why = self.guard.go_back(self.saver.begun if self.saver.broken else None)
        reached = max(reached, steps[-1])
        self.guard.enter("save", reached)
        self.saver.finish(self.monitor)
        restored = restore(self.resume, self.config, self.manifest, self.order, self.engine, self.ema)
        if restored.path is None:
            raise no_way_back(why, self.saver.state_is_finite())
        self.saver.go_back(restored.step, restored.best)
        self.evaluation = Evaluation()
        self.monitor.event("rollback", reached, f"{why}: back to {restored.path}", steps=steps, to=restored.step)
        return restored.step

    def stop_if_asked(self, request: StopRequest | None, done: int) -> None:
        """If a rank was asked to stop: save the state after `done` steps, and end the run."""
        if request is None:
            return
        rank, number = request
        self.guard.wait_for(done)
        if done != self.saver.begun:
            self.save(done)
        self.guard.enter("save", done)
        self.saver.finish(self.monitor)
        saved = self.saver.saved
        lost = f"; {done - saved} steps are lost, because the save failed" if saved != done else ""
        text = f"stopped after step {done} (rank {rank} got {number.name}); started again, the run goes on from step "
        text += f"{saved}{lost}"
        self.monitor.event("preempted", done, text, signal=number.name, rank=rank)
        raise Stopped(text)

    def evaluate(self, done: int) -> bool:
        """Score the weights and their EMA; returns whether they are better than those of every checkpoint."""
        self.stop_if_asked(self.guard.collect_pending(done), done)
        try:
            self.evaluation = self.evaluator.evaluate(done, self.epoch(done))
        except AskedToStop as asked:
            self.stop_if_asked(asked.request, done)
        self.guard.bad_samples.agree(self.monitor)
        self.stop_if_asked(self.guard.collect_pending(done), done)
        return self.saver.improves(self.evaluation.score(done, self.task.metrics[0]))

    def save(self, done: int) -> None:
        """Begin to write a checkpoint of the state after `done` steps. Waits for the run's last one to be written."""
        self.guard.enter("save", done)
        if self.lock:
            self.lock.check()  # flock does not reach other nodes on every file system
        self.saver.save(done, self.evaluation.score(done, self.task.metrics[0]), self.monitor)
        if done == self.last:
            self.saver.finish(self.monitor)
            if self.saver.saved != done and not self.saver.broken:
                raise NotSaved(done, self.saver.failure)

    def finish(self) -> None:
        """Write `model.safetensors` from the last checkpoint, and the final scores."""
        self.guard.collect_pending(self.last)
        if self.runtime.is_main:
            write_final_weights(
                self.output, checkpoint_path(self.resume.checkpoints, self.last), "ema" if self.ema else "model"
            )
        self.monitor.finish(self.evaluation.step, self.evaluation.scores)
        self.monitor.event("finished", self.last, f"finished {self.last} steps: {self.output / 'model.safetensors'}")
