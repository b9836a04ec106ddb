"""`--resume CHECKPOINT` in a repeated command, and continuing with another number of steps per epoch."""

import json

import pytest

from data_pipeline.storage import open_dataset
from tests.faults import NanLoss
from tests.runs import events, losses, metrics, run, start
from train.checkpoint.info import checkpoint_path, list_checkpoints, read_info, step_of
from train.config import load_config
from train.engine.schedule import learning_rate

SETTINGS = ["checkpoint.every_steps=4", "train.evaluate_every=0"]


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def origin(tiny_config, tmp_path_factory):
    """A run of 12 steps, with a checkpoint every 4."""
    output = tmp_path_factory.mktemp("origin") / "run"
    run(tiny_config, output, *SETTINGS, "train.max_steps=12")
    return output


@pytest.mark.slow
def test_the_same_command_goes_on_and_loses_nothing(tiny_config, origin, tmp_path):
    """Only the first start begins at the other run's checkpoint; checkpoints in the folder are set aside, not lost."""
    command = [*SETTINGS, "checkpoint.keep=1", "--resume", str(checkpoint_path(origin / "checkpoints", 4))]
    run(tiny_config, tmp_path, *SETTINGS, "train.max_steps=4")
    (tmp_path / "checkpoints/superseded_step_00000004").mkdir()
    run(tiny_config, tmp_path, *command, "train.max_steps=8")
    assert names(tmp_path) == ["step_00000008", "superseded_step_00000004", "superseded_step_00000004_2"]
    job = run(tiny_config, tmp_path, *command, "train.max_steps=12")
    assert [line["step"] for line in events(tmp_path, "resume")] == [4, 8]
    assert f"it goes on from {tmp_path / 'checkpoints' / 'step_00000008'}" in job.text()
    assert names(tmp_path) == ["step_00000012", "superseded_step_00000004", "superseded_step_00000004_2"]
    whole = losses(origin)
    assert losses(tmp_path) == whole
    run(tiny_config, tmp_path, *SETTINGS)  # --resume auto continues the same sequence
    assert read_info(checkpoint_path(tmp_path / "checkpoints", 16)).began == str(
        checkpoint_path(origin / "checkpoints", 4).resolve()
    )


@pytest.mark.slow
def test_going_back_in_the_own_folder_is_done_once_too(tiny_config, tmp_path):
    """Even if the named checkpoint has been pruned since."""
    run(tiny_config, tmp_path, *SETTINGS, "train.max_steps=12")
    command = [*SETTINGS, "checkpoint.keep=1", "--resume", str(checkpoint_path(tmp_path / "checkpoints", 4))]
    run(tiny_config, tmp_path, *command, "train.max_steps=8")
    assert names(tmp_path) == ["step_00000008", "superseded_step_00000008", "superseded_step_00000012"]
    run(tiny_config, tmp_path, *command, "train.max_steps=12")
    assert [line["step"] for line in events(tmp_path, "resume")] == [4, 8]
    assert names(tmp_path) == ["step_00000012", "superseded_step_00000008", "superseded_step_00000012"]


def lines(output) -> list[dict]:
    return sorted(metrics(output, "train"), key=lambda line: line["step"])


@pytest.mark.slow
def test_another_global_batch_goes_on_at_the_same_epoch(tiny_config, origin, tmp_path):
    """8 steps per epoch, then 4: step 8, the end of epoch 1, becomes step 4; rate, epoch and samples follow it."""
    changed = ["train.global_batch=64", "train.evaluate_every=0", "--resume-with-changes"]
    from_epochs_end = ["--resume", str(checkpoint_path(origin / "checkpoints", 8))]
    job = run(tiny_config, tmp_path / "new", *changed, *from_epochs_end)
    assert "step 8, the end of epoch 1, is step 4 from here on" in job.text()
    assert [line["step"] for line in lines(tmp_path / "new")] == [5, 6, 7, 8]
    assert [line["epoch"] for line in lines(tmp_path / "new")] == [1.25, 1.5, 1.75, 2.0]
    config = load_config(tiny_config, ["train.global_batch=64"])
    assert [line["lr"] for line in lines(tmp_path / "new")] == [learning_rate(config, step, 4) for step in (4, 5, 6, 7)]
    taken = [json.loads(line)["ids"] for line in (tmp_path / "new/samples/rank_0.jsonl").read_text().splitlines()]
    plain = tmp_path / "plain"
    run(tiny_config, plain, "train.global_batch=64", "train.evaluate_every=0")
    assert taken == [json.loads(line)["ids"] for line in (plain / "samples/rank_0.jsonl").read_text().splitlines()][4:]
    info = read_info(checkpoint_path(tmp_path / "new/checkpoints", 8))
    assert (info.steps_per_epoch, info.optimizer_step) == (4, 12)
    run(tiny_config, tmp_path / "new", "train.global_batch=64", "train.evaluate_every=0")  # finished already
    assert [step_of(path) for path in list_checkpoints(tmp_path / "new/checkpoints")] == [8, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "where", "sentence"),
    [
        (12, "new", "that can be gone on from at an epoch's end alone, and step 12 is none"),
        (8, "origin", "go on in a new folder: --output NEW --resume "),
        (None, "origin", "go on in a new folder: --output NEW --resume "),
    ],
)
def test_where_a_step_would_mean_another_epoch_it_is_refused(tiny_config, origin, tmp_path, step, where, sentence):
    output = {"new": tmp_path / "new", "origin": origin}[where]
    before = names(origin)
    resume = [] if step is None else ["--resume", str(checkpoint_path(origin / "checkpoints", step))]
    job = start(tiny_config, output, "train.global_batch=64", "--resume-with-changes", *resume)
    assert job.wait() == [78]
    last = job.text().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last and "had 8 steps there, and has 4" in last
    assert names(origin) == before


@pytest.mark.slow
def test_a_dataset_of_another_size_is_another_number_of_steps(tiny_config, tiny_images, origin, tmp_path):
    from data_pipeline.preparation.prepare import prepare

    for image in sorted((tiny_images / "train").rglob("*.jpg"))[::2]:
        copy = tmp_path / "images/train" / image.parent.name / image.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(image.read_bytes())
    half = tmp_path / "half"
    prepare(str(tmp_path / "images"), half, workers=1, shard_bytes=100_000, val_fraction=0.0, seed=0)
    assert open_dataset(load_config(tiny_config, [f"data.path={half}"]).data).split("train").samples == 130
    command = [
        f"data.path={half}",
        "train.evaluate_every=0",
        "--resume",
        str(checkpoint_path(origin / "checkpoints", 8)),
    ]
    job = run(tiny_config, tmp_path / "run", *command, "--resume-with-changes")
    assert "step 8, the end of epoch 1, is step 4 from here on" in job.text()
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1.25, 1.5, 1.75, 2.0]


@pytest.mark.slow
def test_the_new_folder_has_a_checkpoint_from_the_start(tiny_config, origin, tmp_path):
    """The run ends there if nothing is left to train, and can go back before its first save of its own."""
    command = [*SETTINGS, "--resume", str(checkpoint_path(origin / "checkpoints", 8))]
    run(tiny_config, tmp_path / "done", *command, "train.max_steps=8")
    assert names(tmp_path / "done") == ["step_00000008"] and (tmp_path / "done/model.safetensors").exists()
    settings = ["train.max_steps=12", "guard.max_skipped=2"]
    run(tiny_config, tmp_path / "back", *command, *settings, before=NanLoss(0, (9, 10)))
    assert [event["to"] for event in events(tmp_path / "back", "rollback")] == [8]
    assert losses(tmp_path / "back")[12] == losses(origin)[12]
