"""The sections of a config, one frozen pydantic class each.

Light: imports neither torch nor anything else that is slow.
"""

import difflib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

import catmodel
from data_pipeline.config import Fraction, Section

if TYPE_CHECKING:
    from train.config import Config

Positive = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class TaskConfig(Section):
    """What is trained. A task with settings of its own derives its `Settings` from this class (train/tasks/)."""

    # Keys that play a part in evaluation and use alone: a resume and launch/evaluate.py may change them.
    evaluation_keys: ClassVar[tuple[str, ...]] = ()

    name: str = Field(
        "classification", description="a folder of train/tasks/, or a name that train.task_registry.register has added"
    )


# Settings of other sections that describe how classification cuts and mixes images.
OF_CLASSIFICATION = {
    "data": ("image_size", "eval_crop"),
    "augment": (
        *("crop", "crop_scale", "crop_ratio", "crop_padding", "rand_augment", "color_jitter", "erasing"),
        *("erasing_mode", "mixup", "cutmix", "mix_probability", "switch_probability", "label_smoothing"),
    ),
}


def refuse_settings_of_classification(config: "Config", keys: str) -> None:
    """Raise ValueError if one is set, for a task that cuts images by its own `keys` and does not mix them."""
    for name, unused in OF_CLASSIFICATION.items():
        section = getattr(config, name)
        for key in unused:
            if getattr(section, key) != type(section).model_fields[key].default:
                raise ValueError(
                    f"{name}.{key} does nothing with task.name={config.task.name}, whose images are cut by {keys} and "
                    "are not mixed: leave it out"
                )


class ModelConfig(Section):
    """The network. A key that is left out keeps the named model's own default."""

    name: str = Field(description="cat_…, pvt_…, cotnet…, cotnext… or se_cotnetd…: see catmodel.list_models()")
    init_from: str | None = Field(
        None, description="first weights: a published file, a .safetensors file, a run's folder or a checkpoint's"
    )
    depths: tuple[Positive, ...] | None = Field(
        None, min_length=1, description="blocks per stage; of CAT cross attention blocks"
    )
    drop_path_rate: Fraction | None = Field(None, description="stochastic depth at the deepest block")
    num_heads: tuple[Positive, ...] | None = Field(
        None, description="CAT, PVT: heads of (inner-patch) attention per stage"
    )
    embed_dim: Positive | None = Field(None, description="CAT: channels of the first stage")
    mlp_ratio: Ratio | None = Field(None, description="CAT: hidden channels of an MLP, relative to its inputs")
    embed_patch_size: Positive | None = Field(None, description="CAT: side of a token, in pixels")
    patch_size: Positive | None = Field(None, description="CAT: side of an attention patch, in tokens")
    patch_embed: Literal["conv", "slice"] | None = Field(None, description="CAT: how pixels become tokens")
    ape: bool | None = Field(None, description="CAT: absolute position")
    shifted_windows: bool | None = Field(None, description="CAT: in the second inner-patch attention of every block")
    cpsa_num_heads: Positive | None = Field(None, description="CAT: heads of cross-patch attention")
    ipsa_drop: Fraction | None = Field(None, description="CAT: attention dropout in inner-patch attention")
    cpsa_drop: Fraction | None = Field(None, description="CAT: attention dropout in cross-patch attention")
    init_std: Ratio | None = Field(None, description="CAT: standard deviation of the initial linear weights")
    embed_dims: tuple[Positive, ...] | None = Field(None, description="PVT: channels per stage")
    mlp_ratios: tuple[Ratio, ...] | None = Field(
        None, description="PVT: hidden channels of an MLP, relative to its inputs, per stage"
    )
    sr_ratios: tuple[Positive, ...] | None = Field(
        None, description="PVT: spatial reduction of keys and values per stage"
    )
    width: Ratio | None = Field(None, description="CoTNet: channels of the CoT, relative to a ResNet's")
    key_groups: Positive | None = Field(None, description="CoTNet: groups of the keys' convolution")
    groups: Positive | None = Field(None, description="CoTNet: groups of the CoT's other convolutions")
    hybrid: bool | None = Field(None, description="CoTNet: the design of SE-CoTNetD")
    stem_width: Positive | None = Field(None, description="CoTNet: channels of a hybrid's stem")
    blur: bool | None = Field(None, description="CoTNet: filter before a map is halved")
    drop_rate: Fraction | None = Field(None, description="CoTNet: dropout before the head")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        """model.name is one of catmodel.list_models()."""
        if name not in catmodel.list_models():
            close = difflib.get_close_matches(name, catmodel.list_models(), 1)
            hint = f"; did you mean {close[0]}?" if close else f"; models: {', '.join(catmodel.list_models())}"
            raise ValueError(f"model.name: there is no model {name!r}{hint}")
        return name

    @model_validator(mode="after")
    def _of_its_family(self) -> "ModelConfig":
        """A setting of another family than model.name's is refused."""
        known = FAMILY_KEYS[family_of(self.name)]
        for key in self.overrides():
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean model.{close[0]}?" if close else f"it takes {', '.join(known)}"
                raise ValueError(f"model.{key} is no setting of {self.name}; {hint}")
        return self

    def overrides(self) -> dict[str, Any]:
        """The settings of the network that were given, as arguments of `catmodel.create_model`."""
        settings = {key for keys in FAMILY_KEYS.values() for key in keys}
        return {key: value for key, value in self.model_dump(include=settings).items() if value is not None}


# The settings of each family of networks: arguments of its classes, which cannot be inspected without importing torch.
FAMILY_KEYS = {
    "cat": (
        *(
            "depths",
            "drop_path_rate",
            "num_heads",
            "embed_dim",
            "mlp_ratio",
            "embed_patch_size",
            "patch_size",
            "patch_embed",
        ),
        *("ape", "shifted_windows", "cpsa_num_heads", "ipsa_drop", "cpsa_drop", "init_std"),
    ),
    "pvt": ("depths", "drop_path_rate", "num_heads", "embed_dims", "mlp_ratios", "sr_ratios"),
    "cotnet": (
        "depths",
        "drop_path_rate",
        "width",
        "key_groups",
        "groups",
        "hybrid",
        "stem_width",
        "blur",
        "drop_rate",
    ),
}


def family_of(model: str) -> str:
    """The key of FAMILY_KEYS for a model's name."""
    prefix = model.split("_")[0]
    return prefix if prefix in FAMILY_KEYS else "cotnet"


class TrainConfig(Section):
    epochs: Positive | None = Field(
        300, description="passes over the training samples; the learning rate's schedule spans them"
    )
    steps: Positive | None = Field(None, description="the length of a run in optimizer steps, in place of train.epochs")
    global_batch: Positive = Field(1024, description="samples per optimizer step, over all ranks")
    micro_batch: Positive | Literal["auto"] = Field(
        128,
        description="samples per forward pass; mixup, cutmix and dropout act inside one. auto: the largest that "
        "fits, then kept",
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="of the network's arithmetic; the master weights are fp32 always"
    )
    seed: int = Field(0, ge=0, description="of the samples' order, augmentation, dropout and first weights")
    log_every: Positive = Field(50, description="steps between lines of metrics")
    max_steps: Positive | None = Field(
        None, description="end early after so many steps; the schedule still spans the whole run"
    )
    evaluate_every: int = Field(
        1, ge=0, description="epochs between evaluations; 0 turns them off, those of evaluate_every_steps too"
    )
    evaluate_every_steps: Positive | None = Field(
        None, description="steps between evaluations, in place of train.evaluate_every"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in backward: less memory, about a third more time"
    )
    kernels: bool = Field(True, description="the Triton kernels, on a GPU that can run them")
    compile: bool = Field(False, description="torch.compile the network: minutes at the start")
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto",
        description="replay micro-batches as CUDA graphs; auto: on a GPU, if the network is compiled and its "
        "inputs have one shape; not with zero.stage=3 or zero.offload",
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, values: Any) -> Any:
        """A run's length is given once: in epochs or in steps."""
        if not isinstance(values, dict) or values.get("steps") is None:
            if isinstance(values, dict) and values.get("epochs", 300) is None:
                raise ValueError("train.epochs is null: give train.steps instead")
            return values
        if values.get("epochs") is not None:
            raise ValueError(
                "train.epochs and train.steps both give a run's length; set train.epochs=null to count in steps"
            )
        return {**values, "epochs": None}

    @model_validator(mode="after")
    def _micro_batches(self) -> "TrainConfig":
        """train.global_batch / train.micro_batch is a whole number, and a multiple of the number of ranks."""
        if self.micro_batch != "auto" and self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch {self.global_batch} is not a multiple of train.micro_batch {self.micro_batch}"
            )
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd", "muon"] = Field(
        "adamw", description="muon: for the weights of hidden linear layers and convolutions, AdamW for the rest"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate, for the whole global batch")
    weight_decay: float = Field(
        0.05, ge=0, description="not applied to biases, norms and what the model names in no_weight_decay()"
    )
    no_decay: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None, description="instead, weight_decay is not applied to parameters whose names contain one of these"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW: decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW: added to the root of the second moment")
    momentum: Fraction = Field(0.9, description="sgd and muon")
    nesterov: bool = Field(False, description="sgd: Nesterov's momentum")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="each layer's learning rate / the next one's, for fine-tuning; 1: the same for all"
    )
    clip_grad: float | None = Field(
        5.0, gt=0, description="largest norm of the whole gradient; null turns clipping off"
    )

    @model_validator(mode="after")
    def _nesterov(self) -> "OptimizerConfig":
        """optimizer.nesterov of sgd needs optimizer.momentum above 0."""
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov needs optimizer.momentum above 0: give one, or leave nesterov out")
        return self


class ScheduleConfig(Section):
    kind: Literal["cosine", "poly", "multistep"] = Field(
        "cosine",
        description="after the warm-up: cosine and poly fall to min_lr over the whole run; multistep falls at "
        "decay_epochs or decay_steps",
    )
    warmup_epochs: float = Field(
        20, ge=0, description="length of the warm-up, in which the learning rate rises to optimizer.lr"
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="length of the warm-up in steps, in place of schedule.warmup_epochs"
    )
    warmup_lr: float = Field(1e-6, ge=0, description="learning rate at step 0")
    min_lr: float = Field(1e-5, ge=0, description="learning rate at the end of cosine and poly")
    power: float = Field(1.0, gt=0, description="poly: exponent of the remaining share of the run")
    decay_epochs: tuple[Positive, ...] = Field(
        (), description="multistep: epochs at which the learning rate is multiplied by decay_rate"
    )
    decay_steps: tuple[Positive, ...] = Field(
        (), description="multistep: the same in optimizer steps, in place of decay_epochs"
    )
    decay_rate: Fraction = Field(0.1, description="multistep: factor of the learning rate at each decay")

    @model_validator(mode="after")
    def _decays(self) -> "ScheduleConfig":
        """schedule.decay_epochs or schedule.decay_steps belong to schedule.kind: multistep, which needs one of them."""
        given = bool(self.decay_epochs) + bool(self.decay_steps)
        if given != (self.kind == "multistep"):
            raise ValueError(
                f"schedule.kind={self.kind} takes {'one' if self.kind == 'multistep' else 'none'} of "
                "schedule.decay_epochs and decay_steps"
            )
        return self


class EmaConfig(Section):
    decay: Fraction = Field(0.9999, description="0 turns EMA off; warmed up as min(decay, (1 + step) / (10 + step))")


class ZeroConfig(Section):
    stage: Literal[0, 1, 2, 3] = Field(
        1, description="divided over the ranks: 1 the optimizer's states, 2 gradients too, 3 weights too"
    )
    offload: bool = Field(False, description="keep optimizer states and fp32 weights in host memory (stages 1–3)")

    @model_validator(mode="after")
    def _offload(self) -> "ZeroConfig":
        """zero.offload needs zero.stage 1, 2 or 3."""
        if self.offload and self.stage == 0:
            raise ValueError(
                "zero.offload needs zero.stage 1, 2 or 3: stage 0 does not partition what would be offloaded"
            )
        return self


class CheckpointConfig(Section):
    every_steps: Positive | None = Field(None, description="steps between checkpoints; null: see every_epochs")
    every_epochs: Positive = Field(1, description="epochs between checkpoints, if every_steps is null")
    keep: Positive = Field(3, description="newest checkpoints kept; the best evaluated one is kept beside them")


class MonitorConfig(Section):
    record_samples: bool = Field(False, description="write the sample ids of every step to samples/rank_*.jsonl")
    images: int = Field(32, ge=0, description="images in TensorBoard's grid of augmented inputs; 0 turns it off")


class TimeoutConfig(Section):
    """Seconds that a rank may spend in one section of a run before the run counts as hung."""

    startup: float = Field(1800, gt=0, description="until the first step can begin")
    first_step: float = Field(1800, gt=0, description="it compiles and fills caches")
    step: float = Field(300, gt=0, description="any other step")
    evaluation: float = Field(300, gt=0, description="for one batch of it")
    save: float = Field(
        600, gt=0, description="waiting for a checkpoint to be written; also what the slowest rank has for its share"
    )


class GuardConfig(Section):
    bad_samples: int = Field(
        100, ge=0, description="distinct unreadable samples, of all ranks since a start, that end it when exceeded"
    )
    max_skipped: Positive = Field(
        20, description="steps in a row without a finite gradient, after which the run goes back to a checkpoint"
    )
    agree_every: float = Field(
        1, ge=0, description="seconds between two agreements of the ranks: who was asked to stop, who is slow"
    )
    grace: float = Field(60, gt=0, description="seconds from a stop signal until this process has ended, saved or not")
    timeout: TimeoutConfig = TimeoutConfig()
