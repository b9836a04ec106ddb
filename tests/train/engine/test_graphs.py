"""Replaying a micro-batch from tensors that stay where they are, as CUDA graphs do, changes no bit of a run.

Without a GPU the recorded function runs again at every replay; its inputs and outputs are the recording's own tensors,
which the next replay overwrites, as on a GPU.
"""

from dataclasses import dataclass

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.faults import NanLoss
from tests.oracle import assert_same_state, ids_by_step, scores, state
from tests.runs import events, losses, run, start
from tests.train.test_families import TINY, with_model
from train.config import ConfigError, load_config
from train.engine.deepspeed_config import gradients_here
from train.engine.flat import ALIGNMENT, FlatGroup, flattened
from train.engine.graphs import graphs_wanted


@dataclass(frozen=True)
class Replay:
    """Turns on replays on the CPU; then, in the rank's process, `also`."""

    also: NanLoss | None = None

    def __call__(self, rank: int) -> None:
        import train.engine.deepspeed_engine as engine
        from train.engine.graphs import Replayed

        get_state = torch.get_rng_state

        def refuse():
            raise RuntimeError("the generator's state cannot be read while a graph is recorded")

        def record(replayed, inputs):
            generator = get_state()
            torch.get_rng_state = refuse
            outputs = replayed._function(inputs)
            torch.get_rng_state = get_state
            torch.set_rng_state(generator)  # recording draws no random numbers
            for leaf in tree_leaves(outputs):
                leaf.fill_(torch.nan)

            def replay():
                for leaf, new in zip(tree_leaves(outputs), tree_leaves(replayed._function(inputs)), strict=True):
                    leaf.copy_(new)
                for leaf in tree_leaves(inputs):
                    leaf.fill_(torch.nan if leaf.is_floating_point() else 0)

            return outputs, replay

        Replayed.record = record
        engine.graphs_wanted = lambda config, device, gradients_here, shapes: (gradients_here, "replayed")
        if self.also:
            self.also(rank)


def both_ways(config, folder, *settings: str, world: int = 2, also: NanLoss | None = None) -> None:
    """Run with and without replays; the two must be the same to the bit."""
    plain, replayed = folder / "plain", folder / "replayed"
    run(config, plain, *settings, world=world, before=also)
    job = run(config, replayed, *settings, world=world, before=Replay(also))
    assert "replayed" in job.text()
    assert losses(replayed) == losses(plain)
    assert ids_by_step(replayed, world) == ids_by_step(plain, world)
    assert scores(replayed) == scores(plain)
    last = max(losses(plain))
    kinds = ("model", "ema", "exp_avg", "exp_avg_sq", "momentum_buffer")
    assert_same_state(state(replayed, last, kinds), state(plain, last, kinds))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "fp32"), (2, "bf16")])
def test_replays_with_accumulation_dropout_clipping_and_evaluations_in_between(tiny_config, tmp_path, stage, precision):
    settings = [
        *(f"zero.stage={stage}", f"train.precision={precision}", "optimizer.clip_grad=0.5", "train.max_steps=10"),
        *("model.drop_path_rate=0.3", "model.cpsa_drop=0.2", "train.evaluate_every_steps=4"),
    ]
    both_ways(tiny_config, tmp_path, *settings)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "stage"), [("cat", 1), ("pvt", 0), ("cotnet", 2)])
def test_replays_with_recomputed_activations(tiny_config, tmp_path, family, stage):
    """With dropout, drop-path and accumulation (PVT: with the largest micro-batch that fits): equal to replays and to
    plain steps that keep all activations.
    """
    config = with_model(tiny_config, tmp_path, TINY[family]) if family in TINY else tiny_config
    rates = ["model.drop_path_rate=0.3"] + (["model.cpsa_drop=0.2", "model.ipsa_drop=0.1"] if family == "cat" else [])
    settings = [*rates, f"zero.stage={stage}", "train.max_steps=5"]
    settings += ["train.micro_batch=auto"] * (family == "pvt")
    both_ways(config, tmp_path, *settings, "train.activation_checkpointing=true")
    run(config, tmp_path / "kept", *settings, world=2)
    assert losses(tmp_path / "kept") == losses(tmp_path / "replayed")
    assert_same_state(state(tmp_path / "kept", 5), state(tmp_path / "replayed", 5))


@pytest.mark.slow
def test_replays_with_batch_norm_and_a_skipped_step(tiny_config, tmp_path):
    config = with_model(tiny_config, tmp_path, TINY["cotnet"])
    both_ways(config, tmp_path, "train.max_steps=6", also=NanLoss(1, steps=(4,)))
    assert [line["step"] for line in events(tmp_path / "replayed", "skipped_step")] == [4]


@pytest.mark.slow
def test_a_replayed_run_goes_on_bitwise_where_it_was_stopped(tiny_config, tmp_path):
    """The first micro-batch after a start is not replayed."""
    settings = ["train.evaluate_every=0", "checkpoint.every_steps=5"]
    run(tiny_config, tmp_path / "whole", *settings, "train.max_steps=9", world=2, before=Replay())
    run(tiny_config, tmp_path / "parts", *settings, "train.max_steps=5", world=2, before=Replay())
    run(tiny_config, tmp_path / "parts", *settings, "train.max_steps=9", world=2, before=Replay())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_state(state(tmp_path / "parts", 9), state(tmp_path / "whole", 9))


def test_without_a_gpu_graphs_are_refused(tiny_config, tmp_path):
    job = start(tiny_config, tmp_path, "train.cuda_graphs=true")
    assert job.wait() == [78]
    assert "train.cuda_graphs=true needs a GPU" in job.text()


@pytest.mark.parametrize(
    ("settings", "wanted", "word"),
    [
        (["train.compile=true"], True, "are replayed"),
        (["train.compile=false"], False, None),
        (["train.compile=true", "train.cuda_graphs=false"], False, None),
        (["train.compile=true", "train.activation_checkpointing=true"], True, "are replayed"),
        (["train.compile=true", "zero.offload=true", "zero.stage=1"], False, "zero.offload"),
        (["zero.stage=3"], False, None),
        (["train.cuda_graphs=true"], True, "are replayed"),
    ],
)
def test_where_steps_are_replayed_on_a_gpu(tiny_config, settings, wanted, word):
    config = load_config(tiny_config, settings)
    found, sentence = graphs_wanted(config, torch.device("cuda"), gradients_here(config, world=2))
    assert found == wanted
    assert (word in sentence) if word else sentence is None


def test_graphs_of_inputs_of_many_shapes_must_be_demanded(tiny_config):
    for wanted, found in (("auto", False), ("true", True)):
        config = load_config(tiny_config, ["train.compile=true", f"train.cuda_graphs={wanted}"])
        replayed, sentence = graphs_wanted(config, torch.device("cuda"), True, shapes=89)
        assert replayed == found and ("may have 89 shapes" in sentence) == (not found)


@pytest.mark.parametrize(
    ("settings", "word"), [(["zero.stage=3"], "zero.stage=3"), (["zero.stage=1", "zero.offload=true"], "zero.offload")]
)
def test_graphs_that_are_demanded_where_they_cannot_be_are_refused(tiny_config, settings, word):
    config = load_config(tiny_config, ["train.cuda_graphs=true", *settings])
    with pytest.raises(ConfigError, match=word):
        graphs_wanted(config, torch.device("cuda"), gradients_here(config, world=2))


def test_parameters_lie_aligned_in_a_flat_tensor_and_keep_their_values():
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (64,), (), (7, 100), (1,))]
    group = FlatGroup.aligned(parameters)
    # Values of the second group lie in memory in other ways: transposed, and one value for all.
    others = [torch.randn(5, 3).T, *(parameter.detach() for parameter in parameters[1:3])]
    others += [torch.tensor(2.0).expand(7, 100), torch.tensor(3.0).expand(1)]
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    try:
        flat = flattened([group, group], [*parameters, *others])
    finally:
        torch.use_deterministic_algorithms(False)
    assert flat.shape == (2 * group.size,) and group.size % ALIGNMENT == 0
    assert all(offset % ALIGNMENT == 0 for offset in group.offsets)
    for part, values in zip(flat.split(group.size), (parameters, others), strict=True):
        for view, value in zip(group.views(part), values, strict=True):
            assert torch.equal(view, value)
        assert torch.count_nonzero(part) == sum(torch.count_nonzero(value) for value in values)
