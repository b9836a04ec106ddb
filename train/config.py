"""The config tree: one frozen pydantic class a section; an unknown key is an error that suggests the right one.

Light on purpose: a bad config is answered before torch is imported.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import SerializeAsAny, ValidationError, field_validator, model_validator

import catmodel
from data_pipeline.config import AugmentConfig, DataConfig, Section
from train import exit_codes
from train.config_sections import (
    CheckpointConfig,
    EmaConfig,
    GuardConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    ScheduleConfig,
    TaskConfig,
    TrainConfig,
    ZeroConfig,
)
from train.task_registry import UnknownTask, find

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest
    from data_pipeline.order import Order
    from data_pipeline.split import Split


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key or file, and the remedy."""

    exit_code = exit_codes.BAD_CONFIG


class Config(Section):
    task: SerializeAsAny[TaskConfig] = TaskConfig()
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    guard: GuardConfig = GuardConfig()

    @field_validator("task", mode="before")
    @classmethod
    def _settings_of_the_task(cls, value: Any) -> Any:
        """task.name is a known task, and the other keys are its settings."""
        if not isinstance(value, dict):
            return value
        try:
            settings = find(value.get("name", "classification")).Settings
        except UnknownTask as error:
            raise ValueError(f"task.name: {error}") from error
        try:
            return settings.model_validate(value)
        except ValidationError as error:
            raise ValueError(_explain(error, ("task",), settings)) from error

    @model_validator(mode="after")
    def _fits_the_task(self) -> "Config":
        """The other sections go with the task."""
        if check := getattr(find(self.task.name), "check_config", None):
            check(self)
        return self

    def check_dataset(self, manifest: "Manifest") -> None:
        """Raise ConfigError if the dataset is not one for the task."""
        if check := getattr(find(self.task.name), "check_dataset", None):
            try:
                check(manifest)
            except ValueError as error:
                raise ConfigError(f"data.path {self.data.path} does not fit: {error}") from error

    def order(
        self,
        split: "Split",
        *,
        seed: int | None = None,
        global_batch: int | None = None,
        micro_batch: int | None = None,
    ) -> "Order":
        """The order in which the task uses the samples of `split`; sizes are by default those of the config, and the
        micro-batch the smallest that "auto" may come to. Raises ValueError for sizes that do not fit together.
        """
        from data_pipeline.order import Order

        sizes, data = self.train, self.data
        places = (
            sizes.seed if seed is None else seed,
            global_batch or sizes.global_batch,
            micro_batch or self.smallest_micro_batch,
        )
        if order := getattr(find(self.task.name), "order", None):
            return order(self, split, *places)
        return Order(places[0], split.samples, *places[1:], data.shuffle, data.repeats)

    @model_validator(mode="after")
    def _schedule_fits(self) -> "Config":
        """The warm-up is shorter than the run."""
        schedule, train = self.schedule, self.train
        if train.steps is None and schedule.warmup_steps is None and schedule.warmup_epochs >= train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs {schedule.warmup_epochs:g} leaves nothing of train.epochs {train.epochs}"
            )
        if train.steps is not None and schedule.warmup_steps is not None and schedule.warmup_steps >= train.steps:
            raise ValueError(
                f"schedule.warmup_steps {schedule.warmup_steps} leaves nothing of train.steps {train.steps}"
            )
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run, which the learning rate's schedule spans."""
        return self.train.steps or self.train.epochs * steps_per_epoch

    def last_step(self, steps_per_epoch: int) -> int:
        """The step at which the run ends: that of `total_steps`, or train.max_steps if it is smaller."""
        total = self.total_steps(steps_per_epoch)
        return min(total, self.train.max_steps or total)

    def check_warmup(self, steps_per_epoch: int) -> None:
        """Raise ConfigError if the warm-up is not shorter than the run; either may be given in epochs or in steps."""
        warmup, total = self.warmup_steps(steps_per_epoch), self.total_steps(steps_per_epoch)
        if warmup >= total:
            key = "schedule.warmup_epochs" if self.schedule.warmup_steps is None else "schedule.warmup_steps"
            raise ConfigError(f"the warm-up takes {warmup:g} of the run's {total} steps: lower {key}")

    def warmup_steps(self, steps_per_epoch: int) -> float:
        """Length of the learning rate's warm-up in steps, not rounded."""
        steps = self.schedule.warmup_steps
        return self.schedule.warmup_epochs * steps_per_epoch if steps is None else steps

    def evaluation_interval(self, steps_per_epoch: int) -> int:
        """Steps between two evaluations; 0: none."""
        if not self.train.evaluate_every:
            return 0
        return self.train.evaluate_every_steps or self.train.evaluate_every * steps_per_epoch

    def checkpoint_interval(self, steps_per_epoch: int) -> int:
        """Steps between two checkpoints."""
        return self.checkpoint.every_steps or self.checkpoint.every_epochs * steps_per_epoch

    @property
    def smallest_micro_batch(self) -> int:
        """What train.micro_batch says, or for "auto" what it may come to: the number of ranks must share a global batch
        of these.
        """
        return catmodel.least_images(self.model.name) if self.train.micro_batch == "auto" else self.train.micro_batch

    def with_micro_batch(self, size: int) -> "Config":
        """The same settings with what "auto" has come to."""
        return self.model_copy(update={"train": self.train.model_copy(update={"micro_batch": size})})

    @model_validator(mode="after")
    def _pooled_images(self) -> "Config":
        """train.micro_batch is 2 or more for a CoTNet, which normalises pooled images over the batch."""
        least = catmodel.least_images(self.model.name)
        if self.smallest_micro_batch < least:
            raise ValueError(
                f"train.micro_batch {self.train.micro_batch} is too small for {self.model.name}: its batch norms "
                f"need {least}"
            )
        return self

    @model_validator(mode="after")
    def _whole_network(self) -> "Config":
        """train.compile needs zero.stage 0, 1 or 2."""
        if self.train.compile and self.zero.stage == 3:
            raise ValueError(
                "train.compile needs zero.stage 0, 1 or 2: at stage 3 DeepSpeed gathers weights in between what is "
                "compiled"
            )
        return self

    @model_validator(mode="after")
    def _whole_matrices(self) -> "Config":
        """optimizer.name: muon needs zero.stage 0."""
        if self.optimizer.name == "muon" and self.zero.stage:
            raise ValueError(
                f"optimizer.name=muon needs zero.stage=0, not {self.zero.stage}: ZeRO cuts the matrices that it "
                "works on"
            )
        return self


# Keys in epochs, and those in steps that take their place.
IN_STEPS = {
    "train.evaluate_every": "train.evaluate_every_steps",
    "schedule.warmup_epochs": "schedule.warmup_steps",
    "checkpoint.every_epochs": "checkpoint.every_steps",
}

# Keys that do not change what a step computes, beside those of TaskConfig.evaluation_keys: a resumed run may change
# them. All others are the run's identity.
FREE_KEYS = (
    "zero.",
    "checkpoint.",
    "monitor.",
    "guard.",
    "data.path",
    "data.backend",
    "data.device",
    "data.cache_dir",
    "data.cache_gb",
    "data.workers",
    "data.prefetch",
    "train.log_every",
    "train.max_steps",
    "train.evaluate_every",
    "train.activation_checkpointing",
    "train.kernels",
    "train.compile",
    "train.cuda_graphs",
)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read `path`, its `base` files below it and `section.key=value` overrides above it.

    Raises ConfigError with one sentence.
    """
    tree = override(_read(Path(path), seen=()), overrides)
    _check_overrides(flatten(override({}, overrides)), flatten(tree))
    return parse_config(tree, source=str(path))


def override(tree: dict, settings: Sequence[str]) -> dict:
    """`tree` with values replaced by `section.key=value` settings, whose values are YAML. Raises ConfigError."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"override {setting!r} is not of the form section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {setting!r}: the value is not YAML ({_first_line(error)})") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
    return tree


def _check_overrides(given: dict, values: dict) -> None:
    """Raise ConfigError if a key of the command line, one of `given`, does nothing beside the file's `values`."""
    for epochs, steps in IN_STEPS.items():
        off = (epochs, values.get(epochs)) == ("train.evaluate_every", 0)  # which turns off those in steps, too
        idle, other, remedy = (steps, epochs, "1") if off else (epochs, steps, "null")
        if idle in given and values.get(steps) is not None:
            raise ConfigError(f"{idle} does nothing beside {other}={values[other]}: set {other}={remedy} too")


def parse_config(tree: dict, source: str) -> Config:
    """Validate a tree of plain values; `source` names it in the error."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 3}} → {"train.epochs": 3}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def is_free(key: str, task: type[TaskConfig]) -> bool:
    """Whether a resumed run may change a key. task: the class of the section task."""
    return key.startswith(FREE_KEYS) or key in task.evaluation_keys


def differences(old: dict, new: dict, *, free: bool) -> list[str]:
    """Keys whose values differ between two dumped configs: the `free` ones, or those that are a run's identity.

    Values are in the form in which an override takes them.
    """
    task = find(new["task"]["name"]).Settings
    old, new = flatten(old), flatten(new)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [
        f"{key} ({_as_yaml(old.get(key))} → {_as_yaml(new.get(key))})" for key in changed if is_free(key, task) == free
    ]


def _as_yaml(value: Any) -> str:
    """A value as YAML in one line, without the "..." that ends a document of one scalar."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=float("inf")).strip()[1:-1]


def _read(path: Path, seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise ConfigError(f"{path} is its own base; remove the circle")
    try:
        with path.open("rb") as file:
            tree = yaml.load(file, _Loader)
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML in UTF-8: {_first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of sections ({', '.join(Config.model_fields)})")
    base = tree.pop("base", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: base is the name of one file, not {base!r}")
    return tree if base is None else _merge(_read(path.parent / base, (*seen, path.resolve())), tree)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"{self.name}: {name} is given twice, in lines {lines[name]} and {line}: remove one")
            lines[name] = line
        return super().construct_mapping(node, deep)


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(error: ValidationError, place: tuple[str, ...] = (), task: type[TaskConfig] = TaskConfig) -> str:
    """pydantic's errors in a sentence. place: of what was validated in the config; task: the class of its section task.

    A value that is of none of several types has an error for each, which are named together.
    """
    sections = _sections(task)
    found: dict[str, list[dict]] = {}
    for item in error.errors():
        key = ""
        for part in (*place, *item["loc"]):
            if not isinstance(part, str) or key in sections:  # else it is the name of one of several types
                key = f"{key}.{part}" if key else str(part)
        found.setdefault(key, []).append(item)
    return "; ".join(_sentence(key, items, sections) for key, items in found.items())


def _sentence(key: str, items: list[dict], sections: dict[str, list[str]]) -> str:
    kind, text = items[0]["type"], items[0]["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"unknown key {key}; {_suggestion(key, sections)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":
        return text if key in text else f"{key}: {text}"
    others = "".join(f", or {item['msg'].removeprefix('Input should be ')}" for item in items[1:])
    return f"{key}: {text[0].lower()}{text[1:]}{others}, not {items[0]['input']!r}"


def _sections(task: type[TaskConfig]) -> dict[str, list[str]]:
    """The keys of every section by its name, also of those inside others; under "" the names of the sections."""
    found: dict[str, list[str]] = {}
    waiting: list[tuple[str, type[Section]]] = [("", Config)]
    for name, section in waiting:  # which grows
        found[name] = list(section.model_fields)
        for key, field in section.model_fields.items():
            inner = task if (name, key) == ("", "task") else field.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                waiting.append((f"{name}.{key}" if name else key, inner))
    return found


def _suggestion(key: str, sections: dict[str, list[str]]) -> str:
    section, dot, leaf = key.rpartition(".")
    close = [section + dot + match for match in difflib.get_close_matches(leaf, sections[section], 1)]
    close += [f"{name}.{leaf}" for name, keys in sections.items() if name and leaf in keys]
    known = ", ".join(section + dot + sibling for sibling in sections[section])
    return f"did you mean {close[0]}?" if close else f"known here: {known}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
