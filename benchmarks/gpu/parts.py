"""The parts of `make gpu`, most important first: what each runs, and for how long at most. Does not import torch."""

from benchmarks.gpu.record import Later, Part

OURS = "cat_base"
SWIN = "swin_small_patch4_window7_224"
CIFAR = ("cifar10_300", "cifar10_100")  # parts, each a config of this name; they need --cifar


def _training(model: str, batch: int, *ways: str) -> Later:
    return Later("model.training", model=model, batch=batch, ways=ways)


PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        *(
            Part(config, {config: Later("cifar.whole", config=config)}, Later("cifar.judge"), limit=600, alone=False)
            for config in CIFAR
        ),
        Part(
            "model",  # also writes gpu-profile.json, the kernels of a step
            {
                "ours 256": _training(OURS, 256, "engine"),
                "eager": _training(OURS, 128, "eager", "plain", "eager graphs"),
                "swin 256": _training(SWIN, 256, "graphs", "compiled"),
                "ours 128": _training(OURS, 128, "engine"),
                "bare 256": _training(OURS, 256, "graphs", "compiled"),
                "swin eager": _training(SWIN, 128, "eager"),
                "plain": _training(OURS, 256, "plain graphs", "plain compiled"),
            },
            Later("model.judge"),
            limit=200,
        ),
        Part(
            "train",
            {family: Later("runs.compare", family=family) for family in ("cotnet", "cat", "pvt")},
            Later("runs.judge"),
            limit=400,
            alone=False,
        ),
        Part("whole", {"whole": Later("runs.whole")}, Later("runs.judge_whole"), limit=200),
        Part(
            "exact",
            {family: Later("exact.compare", family=family) for family in ("cotnet", "cat", "pvt")},
            Later("exact.judge"),
            limit=300,
            alone=False,
        ),
        Part("host", {"host": Later("host.host")}, Later("host.judge"), limit=150),
        Part("recipe", {"recipe": Later("small.recipe")}, Later("small.judge_recipe"), limit=60),
        Part("check", {"check": Later("small.check")}, Later("small.judge_check"), limit=200, alone=False),
        Part("kernels", {"kernels": Later("small.kernels")}, Later("small.judge_kernels"), limit=120),
        Part("loader", {"loader": Later("small.loader")}, Later("small.judge_loader"), limit=60),
        Part(
            "inference",
            {
                "ours": Later("model.inference", model=OURS, batch=256),
                "swin": Later("model.inference", model=SWIN, batch=256),
            },
            Later("model.judge_inference"),
            limit=200,
        ),
        Part(
            "layout",
            {name: Later("model.layout", layout=name) for name in ("contiguous", "channels-last")},
            Later("model.judge_inference"),
            limit=200,
        ),
        Part("lab", {"lab": Later("kernel_lab.lab")}, Later("kernel_lab.judge"), limit=200),
    )
}
NEED_IMAGES = ("train", "whole", "loader")
# What ends within a call of 7 minutes, by a simulation with measured and estimated durations.
CALLS = {
    "speed": ["model", "whole", "host", "loader"],
    "bits": ["train", "exact", "check", "kernels", "inference"],
}
