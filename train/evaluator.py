"""A run's evaluations: of the weights and of their EMA, interrupted by a request to stop."""

import time
from pathlib import Path

from data_pipeline.loader import MicroBatch
from data_pipeline.manifest import Manifest
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.runtime import Runtime
from train.guard.guard import Guard, StopRequest
from train.tasks.base import Task, evaluate
from train.telemetry.metrics import Evaluation, Scores
from train.telemetry.monitor import Monitor, write_details


class AskedToStop(Exception):
    """Leaves an evaluation, on all ranks. When it is caught, the model has its own weights again."""

    def __init__(self, request: StopRequest):
        self.request = request


class Evaluator:
    """Evaluates on the `val` split; every rank has one, and all call it after the same steps."""

    def __init__(
        self,
        task: Task,
        manifest: Manifest,
        engine: Engine,
        ema: Ema | None,
        runtime: Runtime,
        guard: Guard,
        monitor: Monitor,
        output: Path,
    ):
        self._task, self._manifest, self._engine, self._ema = task, manifest, engine, ema
        self._runtime, self._guard, self._monitor, self._output = runtime, guard, monitor, output

    def evaluate(self, done: int, epoch: float) -> Evaluation:
        """Score the weights after `done` steps, and their EMA if there is one. Raises AskedToStop."""
        scores = {"model": self._score(done, epoch, "model")}
        if self._ema:
            with self._ema.swapped_in(AskedToStop):
                scores["ema"] = self._score(done, epoch, "ema")
        return Evaluation(done, scores)

    def _score(self, done: int, epoch: float, weights: str) -> Scores:
        def meet(batch: MicroBatch) -> None:
            """Called before every batch, by all ranks."""
            self._guard.enter("evaluation", done)
            self._guard.bad_samples.meet("val", done, batch)
            if request := self._guard.agree(done):
                raise AskedToStop(request)

        began, split, runtime = time.perf_counter(), self._manifest.split("val"), self._runtime
        with self._engine.evaluating(compiled=self._task.one_shape):
            scores, details = evaluate(
                self._task, self._engine, split, runtime.device, meet, runtime.rank, runtime.world
            )
        if runtime.is_main:
            write_details(
                self._output / "evaluations" / f"{weights}.json", {"step": done, "split": split.fingerprint, **details}
            )
        self._monitor.evaluation(done, epoch, weights, scores, seconds=time.perf_counter() - began)
        self._monitor.details(
            done, weights, lambda: self._task.evaluation_picture(details), lambda: self._task.evaluation_text(details)
        )
        return scores
