"""The run, from start to finish. Read this first."""

import functools
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from train.checkpoint import CheckpointInfo, checkpoint_path, prune, read_weights, save_checkpoint
from train.config import Config, dump_config
from train.ema import Ema
from train.engine import Engine
from train.evaluate import Scores
from train.feed import Feed
from train.guard import BadSamples
from train.monitor import Clock, Monitor, SampleRecord
from train.resume import restore
from train.runtime import Runtime, start_runtime, stop_runtime
from train.schedule import learning_rate
from train.tasks.classification import Classification


class TrainingFailed(Exception):
    """Training cannot go on: the loss is not finite."""

    exit_code = 70


def train(config: Config, manifest: Manifest, order: Order, output: Path, *, resume: str, with_changes: bool) -> None:
    """Train `config` in the folder `output` until `train.epochs` (or `train.max_steps`) are done; every rank calls this.

    `resume` is "auto", "never" or a checkpoint's path. Raises ConfigError, DataError or TrainingFailed.
    """
    runtime = start_runtime()
    run = Run(config, manifest, order, output, runtime, resume, with_changes)
    try:
        run.go()
    finally:
        run.monitor.close()
    run.engine.destroy()
    stop_runtime()


class Run:
    """One process's part of a run. Everything random is a function of the seed and the step, so `step` is the only state of the loop."""

    def __init__(self, config: Config, manifest: Manifest, order: Order, output: Path, runtime: Runtime, resume: str, with_changes: bool):
        self.config, self.manifest, self.order, self.output, self.runtime = config, manifest, order, output, runtime
        self.checkpoints = output / "checkpoints"
        self.share = order.share(runtime.rank, runtime.world)
        self.task = Classification(config, manifest, order, runtime)
        model = self.task.build_model()
        flops = _flops_per_image(model, config) if runtime.device.type == "cuda" else None
        self.engine = Engine(model, config, len(self.share), runtime.device)
        self.ema = Ema(self.engine, config.ema.decay) if config.ema.decay else None
        restored = restore(self.checkpoints, config, manifest, self.engine, self.ema, resume, with_changes)
        self.start, self.scores = restored.step, {}
        self.total = config.train.epochs * order.steps_per_epoch
        self.last = max(self.start, min(self.total, config.train.max_steps or self.total))
        if runtime.is_main:
            (output / "config.yaml").write_text(dump_config(config))
        self.monitor = Monitor(output, config, is_main=runtime.is_main, first=self.start, last=self.last, flops_per_image=flops)
        self.bad_samples = BadSamples(config, runtime.rank)
        self.samples = SampleRecord(output, runtime.rank, config.monitor.record_samples)
        for sentence in restored.notes:
            self.monitor.say(sentence)
        world = f"{runtime.world} × {_device_name(runtime.device)}, ZeRO {config.zero.stage}, {config.train.precision}"
        what = f"resumed from {restored.path}" if restored.path else f"training {config.model.name} on {config.data.path}"
        self.monitor.event(
            "resume" if restored.path else "start",
            self.start,
            f"{what}: step {self.start} of {self.last}, {world}, TensorBoard: tensorboard --logdir {output / 'tensorboard'}",
            world_size=runtime.world,
            zero_stage=config.zero.stage,
        )

    def go(self) -> None:
        """The loop."""
        config, order, task, engine, clock = self.config, self.order, self.task, self.engine, Clock()
        with Feed(task.batches(self.start), task.inputs, self.runtime.device, clock.waited) as feed:
            for step in range(self.start, self.last):
                done, ids = step + 1, []
                losses = torch.zeros(order.micro_batches, dtype=torch.float64, device=self.runtime.device)
                for index in self.share:
                    batch, images, targets = next(feed)
                    self.bad_samples.meet("train", done, batch.bad)
                    if step % order.steps_per_epoch == 0 and index == 0:
                        self.monitor.images(step, images)
                    loss = task.loss(engine, batch, images, targets)
                    engine.backward(loss)
                    feed.prepare()
                    losses[index] = loss.detach()
                    ids += batch.ids.tolist()
                    result = engine.step(learning_rate(config, step, order.steps_per_epoch))
                if result.skipped:
                    self.monitor.event("skipped_step", done, f"step {done} skipped: the gradient overflowed in fp16")
                elif self.ema:
                    self.ema.update(step)
                clock.finish_step()

                self.samples.write(done, ids)
                self.monitor.advance()
                if done % config.train.log_every == 0 or done in (self.start + 1, self.last):
                    self.report(done, losses, result.grad_norm, clock)
                began = time.perf_counter()
                if self.evaluation_due(done):
                    self.evaluate(done)
                if self.checkpoint_due(done):
                    self.save(done)
                clock.skip(time.perf_counter() - began)
        self.finish()

    def report(self, done: int, losses: torch.Tensor, grad_norm: float, clock: Clock) -> None:
        """Metrics of the step just finished: its mean loss over all micro-batches of all ranks."""
        sums = torch.cat([losses, losses.new_tensor([self.bad_samples.new])])
        dist.all_reduce(sums)  # each loss is zero on all ranks but one: the same sum on any number of ranks
        loss = sums[:-1].mean().item()
        lr = learning_rate(self.config, done - 1, self.order.steps_per_epoch)
        self.monitor.train(done, done / self.order.steps_per_epoch, loss, lr, grad_norm, *clock.read())
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss of step {done} is {loss}; lower optimizer.lr, or use train.precision=bf16 instead of fp16")
        if sums[-1].item():
            self.bad_samples.agree(self.monitor)

    def evaluation_due(self, done: int) -> bool:
        epoch, rest = divmod(done, self.order.steps_per_epoch)
        every = self.config.train.evaluate_every
        return bool(every) and self.task.has_validation and rest == 0 and (epoch % every == 0 or done == self.total)

    def checkpoint_due(self, done: int) -> bool:
        return done == self.last or done % (self.config.checkpoint.every_steps or self.order.steps_per_epoch) == 0

    def evaluate(self, done: int) -> None:
        """Score the weights and their EMA."""
        meet = functools.partial(self.bad_samples.meet, "val", done)
        self.scores = {"model": self.task.evaluate(self.engine, meet)}
        if self.ema:
            with self.ema.swapped_in():
                self.scores["ema"] = self.task.evaluate(self.engine, meet)
        for weights, scores in self.scores.items():
            self.monitor.evaluation(done, done / self.order.steps_per_epoch, weights, scores)
        self.bad_samples.agree(self.monitor)

    def save(self, done: int) -> None:
        """Write a checkpoint of the state after `done` steps, then remove those that are not kept."""
        began = time.perf_counter()
        top1 = _best_weights(self.scores).top1 if self.scores and self.evaluation_due(done) else None
        info = CheckpointInfo(
            step=done,
            top1=top1,
            dataset=self.manifest.split("train").fingerprint,
            classes=list(self.manifest.classes),
            config=self.config.model_dump(mode="json"),
            optimizer_step=self.engine.optimizer_step_count(),
            loss_scale=self.engine.loss_scale_state(),
            shapes={name: list(shape) for name, shape in self.engine.shapes.items()},
            versions={"torch": torch.__version__},
            world_size=self.runtime.world,
        )
        path = save_checkpoint(self.checkpoints, info, self.engine, self.ema)
        if self.runtime.is_main:
            prune(self.checkpoints, done, self.config.checkpoint.keep)
        seconds = time.perf_counter() - began
        self.monitor.event("checkpoint", done, f"checkpoint {path} in {seconds:.1f} s", seconds=seconds)

    def finish(self) -> None:
        """Write `model.safetensors` from the last checkpoint, and the final scores."""
        if self.runtime.is_main:
            state = read_weights(checkpoint_path(self.checkpoints, self.last), "ema" if self.ema else "model")
            about = {"model": self.config.model.model_dump(mode="json"), "classes": list(self.manifest.classes), "step": self.last}
            temporary = self.output / "model.safetensors.tmp"
            save_file(state, temporary, metadata={"catmodel": json.dumps(about)})
            os.replace(temporary, self.output / "model.safetensors")
        self.monitor.finish(self.last, self.scores)
        self.monitor.event("finished", self.last, f"finished {self.last} steps: {self.output / 'model.safetensors'}")


def _best_weights(scores: dict[str, Scores]) -> Scores:
    return scores.get("ema", scores["model"])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def _flops_per_image(model: torch.nn.Module, config: Config) -> float:
    """FLOPs of one image, forward and backward (backward counted as twice the forward)."""
    import copy

    from torch.utils.flop_counter import FlopCounterMode

    size = config.data.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, 3, size, size, device="meta"))
    return 3 * counter.get_total_flops()
