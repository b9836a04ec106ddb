"""Plot time and goodput against the number of GPUs, and goodput against the checkpoint interval."""

from dataclasses import replace
from pathlib import Path

from operate.plan.closed_form import expected
from operate.plan.plan import Plan
from operate.plan.simulate import simulate_mean

BLUE, ORANGE, GREY = "#1f5f9f", "#c8591a", "#777777"


def plot(path: Path, title: str, own: Plan, best: Plan, plans: list[Plan], runs: int, seed: int) -> None:
    """Write a PNG: closed form as lines, simulation as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    days, share, interval = figure.subplots(1, 3)
    gpus = [plan.cluster.world for plan in plans]
    days.loglog(gpus, [plan.expected.wall / 86400 for plan in plans], color=BLUE, label="closed form")
    days.loglog(
        gpus, [plan.simulated.wall / 86400 for plan in plans], "o", color=ORANGE, markersize=4, label="simulated"
    )
    epochs, steps = own.workload.epochs, own.workload.steps
    length = f"{steps:,} steps" if epochs is None else f"{epochs} epochs"
    alone = plans[0].expected.productive / 86400
    days.loglog(gpus, [alone / size for size in gpus], ":", color=GREY, label="perfect scaling")
    days.set(xlabel="GPUs", ylabel=f"days to {length}", title="time")
    share.semilogx(gpus, [100 * plan.expected.goodput for plan in plans], color=BLUE)
    share.semilogx(gpus, [100 * plan.simulated.goodput for plan in plans], "o", color=ORANGE, markersize=4)
    share.set(xlabel="GPUs", ylabel="% of the time in steps that count", title="goodput, best interval", ylim=(0, 102))
    larger = [plan.cluster.world for plan in plans if plan.workload.global_batch != own.workload.global_batch]
    for axis in (days, share):
        if larger:
            axis.axvspan(
                min(larger) / 2**0.5, gpus[-1] * 1.3, color="#000000", alpha=0.06, lw=0, label="larger global batch"
            )
        axis.axvline(own.cluster.world, color=GREY, lw=0.8, ls="--", label="this plan")
    days.legend(fontsize=8)

    around = [max(1, round(best.timeline.every * 2 ** (power / 2))) for power in range(-8, 9)]
    around = sorted({every for every in around if every <= best.timeline.steps})
    lines = [replace(best.timeline, every=every) for every in around]
    minutes = [every * best.timeline.step / 60 for every in around]
    interval.semilogx(minutes, [100 * expected(line).goodput for line in lines], color=BLUE)
    interval.semilogx(
        minutes, [100 * simulate_mean(line, seed, runs)[0].goodput for line in lines], "o", color=ORANGE, markersize=4
    )
    interval.axvline(best.timeline.every * best.timeline.step / 60, color=GREY, lw=0.8, label="best")
    interval.axvline(own.timeline.every * own.timeline.step / 60, color=GREY, lw=0.8, ls="--", label="as configured")
    interval.set(
        xlabel="minutes between checkpoints",
        ylabel="% of the time in steps that count",
        title=f"goodput on {own.cluster.world} GPUs",
    )
    interval.legend(fontsize=8)
    for axis in (days, share, interval):
        axis.grid(alpha=0.25, which="major")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
