"""The parts of `make gpu`, most important first: what each runs, and for how long at most. Does not import torch."""

from benchmarks.gpu_record import Later, Part

OURS = "cat_base"
SWIN = "swin_small_patch4_window7_224"


def _training(model: str, batch: int, *ways: str) -> Later:
    return Later("gpu_model.training", model=model, batch=batch, ways=ways)


PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("cifar", {"cifar": Later("gpu_cifar.whole")}, Later("gpu_cifar.judge"), limit=600, alone=False),
        Part(
            "model",  # also writes gpu-profile.json, the kernels of a step
            {
                "ours 256": _training(OURS, 256, "engine"),
                "swin 256": _training(SWIN, 256, "graphs", "compiled"),
                "ours 128": _training(OURS, 128, "engine"),
                "bare 256": _training(OURS, 256, "graphs", "compiled"),
                "eager": _training(OURS, 128, "eager", "plain", "eager graphs"),
                "swin eager": _training(SWIN, 128, "eager"),
                "plain": _training(OURS, 256, "plain graphs"),
            },
            Later("gpu_model.judge"),
            limit=200,
        ),
        Part(
            "train",
            {family: Later("gpu_runs.compare", family=family) for family in ("cat", "cotnet", "pvt")},
            Later("gpu_runs.judge"),
            limit=400,
            alone=False,
        ),
        Part("whole", {"whole": Later("gpu_runs.whole")}, Later("gpu_runs.judge_whole"), limit=200),
        Part(
            "exact",
            {family: Later("gpu_exact.compare", family=family) for family in ("cat", "cotnet", "pvt")},
            Later("gpu_exact.judge"),
            limit=300,
            alone=False,
        ),
        Part("host", {"host": Later("gpu_host.host")}, Later("gpu_host.judge"), limit=90),
        Part("recipe", {"recipe": Later("gpu_small.recipe")}, Later("gpu_small.judge_recipe"), limit=60),
        Part("check", {"check": Later("gpu_small.check")}, Later("gpu_small.judge_check"), limit=150, alone=False),
        Part("kernels", {"kernels": Later("gpu_small.kernels")}, Later("gpu_small.judge_kernels"), limit=60),
        Part("loader", {"loader": Later("gpu_small.loader")}, Later("gpu_small.judge_loader"), limit=60),
        Part(
            "inference",
            {
                "ours": Later("gpu_model.inference", model=OURS, batch=256),
                "swin": Later("gpu_model.inference", model=SWIN, batch=256),
            },
            Later("gpu_model.judge_inference"),
            limit=200,
        ),
        Part(
            "layout",
            {name: Later("gpu_model.layout", layout=name) for name in ("contiguous", "channels-last")},
            Later("gpu_model.judge_inference"),
            limit=200,
        ),
    )
}
NEED_IMAGES = ("train", "whole", "loader")
USUAL = [name for name in PARTS if name != "cifar"]  # which needs --cifar
