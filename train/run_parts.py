"""What a run is made of, built in the order that a start needs. The loop that uses it is in trainer.py."""

from pathlib import Path

from data_pipeline.loader import Loader, MicroBatch
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from train.auto_micro_batch import settle_micro_batch
from train.checkpoint.format import describe
from train.checkpoint.init_from import load_first_weights
from train.checkpoint.prune import clean_up
from train.checkpoint.resume import lost_steps, restore
from train.checkpoint.resume_point import Resume
from train.checkpoint.saver import Saver
from train.config import Config
from train.engine.batch_norm import RunningStatistics
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.flops import training_flops
from train.engine.runtime import start_runtime
from train.engine.schedule import evaluation_due
from train.evaluator import Evaluator
from train.guard.agreement import patience
from train.guard.guard import Guard
from train.guard.run_lock import RunLock
from train.tasks.base import build_task, training_batches
from train.telemetry.metrics import Evaluation
from train.telemetry.monitor import Monitor, SampleRecord, write_config
from train.telemetry.start_message import announce_start, start_times


class RunParts:
    """One process's parts of a run, started: the process group, the weights that the run goes on from, and rank 0's
    files.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        order: Order,
        output: Path,
        lock: RunLock | None,
        guard: Guard,
        resume: Resume,
    ):
        self.runtime = runtime = start_runtime(patience(config.guard.timeout))
        store = guard.connect(runtime.device)
        notes = runtime.advice(config.train.precision)
        config, order, more = settle_micro_batch(config, order, manifest.classes, runtime, resume)
        notes += more
        self.config, self.manifest, self.order, self.output = config, manifest, order, output
        self.lock, self.guard, self.resume = lock, guard, resume
        notes += clean_up(resume.checkpoints) if runtime.is_main else []

        self.share = order.share(runtime.rank, runtime.world)
        self.task = task = build_task(config, manifest.classes)
        model = task.initial_model()
        notes += load_first_weights(model, task, runtime, resume)
        flops = training_flops(model, task.example, runtime.device)
        shapes = task.views().most_shapes
        self.engine = engine = Engine(model, task.losses_to_train, config, len(self.share), runtime.device, shapes)
        self.statistics = RunningStatistics(engine.module)
        self.ema = Ema(engine, config.ema.decay) if config.ema.decay else None

        self.restored = restored = restore(resume, config, manifest, order, engine, self.ema)
        self.start = restored.step
        self.last = max(self.start, config.last_step(order.steps_per_epoch))
        about = describe(self.start, config, manifest, task.metrics[0], engine, order.steps_per_epoch, restored.began)
        self.saver = Saver(resume.checkpoints, about, task.metrics[0], restored.best, engine, self.ema, store, config)
        lost = lost_steps(output / "metrics.jsonl", self.start)

        main = runtime.is_main
        self.monitor = monitor = Monitor(output, config, task.metrics, task.samples, main, self.start, self.last, flops)
        self.samples = SampleRecord(output, runtime.rank, config.monitor.record_samples)
        self.evaluation = Evaluation()
        guard.report_to(monitor, config.data.path, runtime.rank)
        self.evaluator = Evaluator(task, manifest, engine, self.ema, runtime, guard, monitor, output)
        notes += write_config(output, config) if main else []
        if config.train.compile and shapes > 1:
            notes.append(f"the network is compiled for each shape of training inputs: there may be up to {shapes}")
        notes += [engine.about_graphs] if engine.about_graphs else []
        if "val" not in manifest.splits:
            notes.append("the dataset has no val split, so the run is not evaluated")
        for sentence in notes + restored.notes:
            monitor.say(sentence)
        fields = {
            "world_size": runtime.world,
            "zero_stage": engine.stage,
            "device": runtime.device_name(),
            "versions": about.versions,
        }
        fields |= {"steps_per_epoch": order.steps_per_epoch, **start_times(lock.previous if lock else None)}
        alone = " (on one rank there is nothing to partition)" if engine.stage != config.zero.stage else ""
        where = f"{runtime.describe()}, ZeRO {engine.stage}{alone}, {config.train.precision}"
        announce_start(monitor, task.metrics, restored.path, self.start, self.last, lost, where, fields)

    def close(self) -> None:
        """End this rank's threads, and close its files."""
        self.saver.close()
        self.monitor.close()
        self.samples.close()

    def batches(self, start: int) -> Loader:
        """This rank's micro-batches from step `start` on, without end."""
        return training_batches(
            self.task, self.manifest.split("train"), self.order, self.runtime.rank, self.runtime.world, start
        )

    def inputs(self, batch: MicroBatch):
        """A micro-batch on the device, as the task takes it."""
        return self.task.inputs(batch, self.order.epoch_of(batch.step), self.runtime.device)

    @property
    def must_go_back(self) -> bool:
        """Whether too many steps in a row were skipped, or the state is not finite. The same on all ranks."""
        return self.guard.skipped_too_often or self.saver.broken

    def epoch(self, done: int) -> float:
        return done / self.order.steps_per_epoch

    def evaluation_due(self, done: int) -> bool:
        return "val" in self.manifest.splits and evaluation_due(self.config, done, self.order.steps_per_epoch)

    def checkpoint_due(self, done: int) -> bool:
        return done == self.last or done % self.config.checkpoint_interval(self.order.steps_per_epoch) == 0
