"""The parts of `make gpu`, most important first: what each runs, and for how long at most. Does not import torch."""

from benchmarks.gpu_record import Later, Part

OURS = "cat_base"
SWIN = "swin_small_patch4_window7_224"


def _training(model: str, batch: int, *ways: str) -> Later:
    return Later("gpu_model.training", model=model, batch=batch, ways=ways)


PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part(
            "exact",
            {family: Later("gpu_exact.compare", family=family) for family in ("cat", "pvt", "cotnet")},
            Later("gpu_exact.judge"),
            limit=200,
            alone=False,
        ),
        Part(
            "train",
            {family: Later("gpu_runs.compare", family=family) for family in ("cat", "pvt", "cotnet")},
            Later("gpu_runs.judge"),
            limit=240,
            alone=False,
        ),
        Part("check", {"check": Later("gpu_small.check")}, Later("gpu_small.judge_check"), limit=150, alone=False),
        Part(
            "model",
            {
                "ours 256": _training(OURS, 256, "engine", "graphs", "compiled"),
                "swin 256": _training(SWIN, 256, "graphs", "compiled"),
                "ours 128": _training(OURS, 128, "engine", "graphs", "compiled"),
                "eager": _training(OURS, 128, "eager", "plain"),
                "swin 128": _training(SWIN, 128, "graphs", "compiled", "eager"),
                "plain": _training(OURS, 256, "plain graphs"),
            },
            Later("gpu_model.judge"),
            limit=150,
            warm=("ours 256", "swin 256", "ours 128", "swin 128", "plain"),
        ),
        Part(
            "profile",
            {"profile": Later("gpu_model.profile")},
            Later("gpu_model.judge_profile"),
            limit=40,
            warm=("profile",),
        ),
        Part("whole", {"whole": Later("gpu_runs.whole")}, Later("gpu_runs.judge_whole"), limit=70, warm=("whole",)),
        Part("recipe", {"recipe": Later("gpu_small.recipe")}, Later("gpu_small.judge_recipe"), limit=40),
        Part("kernels", {"kernels": Later("gpu_small.kernels")}, Later("gpu_small.judge_kernels"), limit=45),
        Part("loader", {"loader": Later("gpu_small.loader")}, Later("gpu_small.judge_loader"), limit=60),
        Part(
            "inference",
            {
                "ours": Later("gpu_model.inference", model=OURS, batch=256),
                "swin": Later("gpu_model.inference", model=SWIN, batch=256),
            },
            Later("gpu_model.judge_inference"),
            limit=60,
            warm=("ours", "swin"),
        ),
        Part(
            "layout",
            {"layout": Later("gpu_model.layout")},
            Later("gpu_model.judge_inference"),
            limit=40,
            warm=("layout",),
        ),
    )
}
NEED_IMAGES = ("train", "whole", "loader")
