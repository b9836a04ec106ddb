"""The parts of `make gpu`, most important first: what each runs, and for how long at most. Does not import torch."""

from collections.abc import Sequence

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
            limit=300,
            alone=False,
        ),
        Part(
            "train",
            {family: Later("gpu_runs.compare", family=family) for family in ("cat", "pvt", "cotnet")},
            Later("gpu_runs.judge"),
            limit=400,
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
        ),
        Part(
            "profile",
            {"profile": Later("gpu_model.profile")},
            Later("gpu_model.judge_profile"),
            limit=100,
        ),
        Part("whole", {"whole": Later("gpu_runs.whole")}, Later("gpu_runs.judge_whole"), limit=130),
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
        ),
        Part(
            "layout",
            {"layout": Later("gpu_model.layout")},
            Later("gpu_model.judge_inference"),
            limit=40,
        ),
    )
}
NEED_IMAGES = ("train", "whole", "loader")
# What is compiled before the timed parts: (part, job) one after the other, several such rows side by side. Together
# they need up to 75 GB on the device.
COMPILED = (
    (("model", "ours 256"), ("model", "ours 128"), ("profile", "profile"), ("whole", "whole")),
    (("model", "swin 256"), ("model", "swin 128"), ("model", "plain")),
    (("inference", "ours"), ("inference", "swin"), ("layout", "layout")),
)
SAME = ("profile", "whole")  # they run what "model" has compiled


def compilations(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The rows of COMPILED that these parts need, each as a list."""
    wanted = [name for name in names if not ("model" in names and name in SAME)]
    rows = [[(part, job) for part, job in row if part in wanted] for row in COMPILED]
    # One of SAME compiles for the other.
    rows = [[entry for entry in row if entry[0] != "whole" or "profile" not in wanted] for row in rows]
    return [row for row in rows if row]
