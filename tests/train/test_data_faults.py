"""Runs with damaged data, or with other storage or backends after a resume: the same samples and the same loss."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.backends.stored import stored_in_shards
from data_pipeline.manifest import open_manifest, write_manifest
from data_pipeline.order import Order
from tests.data_pipeline.shards import add_beton
from tests.oracle import sorted_ids_by_step
from tests.runs import losses, metrics, run, start, start_command
from train.telemetry.goodput import read_lines

BAD_TRAIN, BAD_VAL = (3, 77, 200), (5, 100)


@pytest.fixture(scope="module")
def damaged_dataset(tiny_dataset, tmp_path_factory) -> Path:
    """tiny_dataset with three training and two validation images whose bytes do not match the index."""
    folder = Path(shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("damaged") / "dataset"))
    for name, numbers in (("train", BAD_TRAIN), ("val", BAD_VAL)):
        split = open_manifest(folder).split(name)
        for record in split.records[list(numbers)]:
            with open(folder / split.shards[record["shard"]].file, "r+b") as file:
                file.seek(int(record["offset"]) + int(record["size"]) // 2)
                file.write(b"damage")
    return folder


@pytest.fixture(scope="module")
def both_formats(tiny_dataset, tmp_path_factory) -> Path:
    """tiny_dataset, as shards and as FFCV files."""
    folder = Path(shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("formats") / "dataset"))
    manifest, splits = open_manifest(folder), {}
    for name, split in manifest.splits.items():
        stored, failures = stored_in_shards(split).read(range(split.samples))
        assert not failures
        splits[name] = add_beton(split, stored, "jpeg")
    write_manifest(replace(manifest, splits=splits))
    return folder


def bad_samples(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "bad_sample"]


@pytest.mark.slow
def test_bad_samples_are_replaced_alike_on_one_and_two_ranks_and_named_once(tiny_config, damaged_dataset, tmp_path):
    for world in (1, 2):
        run(
            tiny_config,
            tmp_path / f"{world}",
            f"data.path={damaged_dataset}",
            "data.repeats=2",
            "train.epochs=4",
            world=world,
        )
    one, two = tmp_path / "1", tmp_path / "2"
    assert losses(two) == pytest.approx(losses(one), rel=1e-5, abs=0)
    order = Order(0, 260, 32, 8, repeats=2)
    instead = {number: order.replacement(number, 0) for number in BAD_TRAIN}
    assert not set(instead) & set(instead.values())
    expected = {step + 1: sorted(instead.get(i, i) for i in order.ids(step).tolist()) for step in range(32)}
    assert sorted_ids_by_step(one, 1) == sorted_ids_by_step(two, 2) == expected

    for output, world in ((one, 1), (two, 2)):
        events = bad_samples(output)
        met = {number for number in BAD_TRAIN if any(number in order.ids(step) for step in range(32))}
        assert met
        named = [(event["split"], event["id"], event["replaced_by"]) for event in events]
        assert sorted(named) == sorted(
            [*(("train", number, instead[number]) for number in met), *(("val", n, None) for n in BAD_VAL)]
        )
        assert {event["rank"] for event in events} <= set(range(world))
        for event in events:
            if event["split"] == "train":
                assert event["id"] in order.ids(event["step"] - 1)
            assert f"sample {event['id']} of split '{event['split']}'" in event["reason"]
        lines = list(read_lines(output / "metrics.jsonl"))
        last = max(place for place, line in enumerate(lines) if line.get("split") == "val")
        # At the end of the first evaluation, not with the next line of metrics: after the last one there is none.
        assert max(line["step"] for line in lines[:last] if line["kind"] == "train") == 8
        log = (output / "train.log").read_text()
        assert log.count("sample 5 of split 'val'") == 1
        assert "It is left out of the score." in log and f"Sample {instead[min(met)]} is used instead." in log
        assert {line["count"] for line in metrics(output, "eval")} == {99}
    for other, expected in zip(metrics(two, "eval"), metrics(one, "eval"), strict=True):
        assert (other["step"], other["weights"]) == (expected["step"], expected["weights"])
        assert other["loss"] == pytest.approx(expected["loss"], rel=1e-5)

    output = tmp_path / "alone"
    start_command("evaluate", output, str(one), "--json").wait()
    lines = (output / "stdout_0").read_text().splitlines()
    assert json.loads(lines[-1])["count"] == 99
    assert sum(line.startswith("left out: ") for line in lines) == 2


@pytest.mark.slow
def test_more_bad_samples_than_the_budget_end_the_run_and_a_larger_budget_goes_on(
    tiny_config, damaged_dataset, tmp_path
):
    settings = [f"data.path={damaged_dataset}", "train.evaluate_every=0", "checkpoint.every_steps=1"]
    job = start(tiny_config, tmp_path, *settings, "guard.bad_samples=1", world=2)
    assert job.wait() == [65, 65]
    for rank in (0, 1):
        last = job.text(rank).splitlines()[-1]
        assert last.startswith("error: ") and "cannot be read: its checksum" in last
        assert "2 samples that cannot be read, and guard.bad_samples allows 1" in last
        assert last.endswith(f"python launch/prepare.py verify {damaged_dataset}")
    assert "Traceback" not in job.text()
    done = max(losses(tmp_path))
    job = run(tiny_config, tmp_path, *settings, "guard.bad_samples=3", world=2)
    assert "guard.bad_samples (1 → 3)" in job.text()
    assert f"step {done - 1} of 16" in job.text()
    assert sorted(losses(tmp_path)) == list(range(1, 17))


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_backend_workers_world_and_place_change_no_sample_in_the_middle_of_a_run(
    tiny_config, both_formats, tmp_path, shuffle
):
    """Killed within both epochs; each start has another backend, number of threads, world size and storage."""
    settings = [f"data.shuffle={shuffle}", "data.repeats=2", "train.evaluate_every=0", "checkpoint.every_steps=3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny_config, whole, *settings, f"data.path={both_formats}", world=1)

    path = f"data.path={both_formats}"
    url = [f"data.path=file://{both_formats}", f"data.cache_dir={tmp_path / 'cache'}"]
    start(tiny_config, parts, *settings, path, "data.backend=ffcv", "data.workers=3", world=2).kill_at(5)
    (parts / "samples").rename(parts / "samples_1")
    start(tiny_config, parts, *settings, *url, "data.prefetch=7", world=1).kill_at(11)
    (parts / "samples").rename(parts / "samples_2")
    job = run(tiny_config, parts, *settings, *url, "data.backend=ffcv", "data.workers=2", world=4)

    assert "data.backend (webdataset → ffcv)" in job.text()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5, abs=0)
    order = Order(0, 260, 32, 8, shuffle, repeats=2)
    assert sorted_ids_by_step(whole, 1) == {step + 1: sorted(order.ids(step).tolist()) for step in range(16)}
    second, third = (line["step"] for line in metrics(parts, "event") if line["event"] == "resume")
    assert 3 <= second <= third < 16
    taken = {}
    for name, world, first in (("samples_1", 2, 0), ("samples_2", 1, second), ("samples", 4, third)):
        later = {step: ids for step, ids in sorted_ids_by_step(parts, world, name).items() if step > first}
        taken = {step: ids for step, ids in taken.items() if step <= first} | later
    assert taken == sorted_ids_by_step(whole, 1)


@pytest.mark.slow
def test_dali_takes_the_same_samples(tiny_config, both_formats, tmp_path):
    """Its pixels differ slightly, and therefore the loss, within a bound."""
    pytest.importorskip("nvidia.dali")
    settings = [f"data.path={both_formats}", "train.evaluate_every=0", "train.max_steps=8"]
    run(tiny_config, tmp_path / "whole", *settings)
    run(tiny_config, tmp_path / "parts", *settings, "train.max_steps=4", world=2)
    run(tiny_config, tmp_path / "parts", *settings, "data.backend=dali", world=1)
    (tmp_path / "parts" / "samples" / "rank_1.jsonl").unlink()
    later = [{s: i for s, i in sorted_ids_by_step(tmp_path / name, 1).items() if s > 4} for name in ("whole", "parts")]
    assert sorted(later[0]) == [5, 6, 7, 8] and later[0] == later[1]
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=0.02)


@pytest.mark.slow
def test_shuffle_and_repeats_are_the_runs_identity(tiny_config, tmp_path):
    run(tiny_config, tmp_path, "train.max_steps=1", "train.evaluate_every=0")
    job = start(tiny_config, tmp_path, "data.shuffle=block", "data.repeats=4", "train.evaluate_every=0")
    assert job.wait() == [78]
    assert "data.repeats (1 → 4), data.shuffle (full → block)" in job.text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "code", "sentence"),
    [
        (["data.path=file:///somewhere"], 78, "data.path file:///somewhere is a URL: set data.cache_dir"),
        (
            ["data.path=nonsense://x", "data.cache_dir=cache"],
            78,
            "data.path nonsense://x cannot be opened: Protocol not known: nonsense",
        ),
        (["data.cache_dir=CACHE", "data.cache_gb=0.0001"], 78, "data.cache_gb 0.0001 is less than the"),
        (["data.backend=ffcv"], 65, "has no FFCV file of split 'train'"),
        (["data.backend=dali", "data.device=gpu"], 78, "data.device gpu needs a GPU, and there is none here"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(tiny_config, tmp_path, overrides, code, sentence):
    if "data.backend=dali" in overrides:
        pytest.importorskip("nvidia.dali")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    job = start(tiny_config, tmp_path, *[text.replace("CACHE", str(tmp_path / "cache")) for text in overrides])
    assert job.wait() == [code]
    last = job.text().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last
    assert "Traceback" not in job.text()


@pytest.mark.slow
def test_a_damaged_shard_ends_the_run_by_name(tiny_config, tiny_dataset, tmp_path):
    copy = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    shard = sorted(copy.glob("train-*.tar"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    job = start(tiny_config, tmp_path / "run", f"data.path=file://{copy}", f"data.cache_dir={tmp_path / 'cache'}")
    assert job.wait() == [65]
    last = job.text().splitlines()[-1]
    assert last.startswith(f"error: file://{copy}/{shard.name} is damaged: its SHA-256 is not the manifest's")


@pytest.mark.slow
@pytest.mark.parametrize("enough", [True, False])
def test_a_shard_that_is_cut_off_while_training(tiny_config, tiny_dataset, tmp_path, enough):
    """Its samples are replaced and reported within the budget, and all ranks end the same way, with the same loss."""
    copy, output = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset")), tmp_path / "run"
    split = open_manifest(copy).split("train")
    in_shard = {int(i) for i in (split.records["shard"] == 1).nonzero()[0]}
    budget = len(in_shard) if enough else len(in_shard) // 2
    settings = [f"data.path={copy}", "train.evaluate_every=0", "train.epochs=6", f"guard.bad_samples={budget}"]
    job = start(tiny_config, output, *settings, world=2)
    while not metrics(output, "train", missing_ok=True):
        assert job.processes[0].is_alive()
        time.sleep(0.01)
    os.truncate(copy / split.shards[1].file, 0)
    assert job.wait() == ([0, 0] if enough else [65, 65])
    named = {event["id"] for event in bad_samples(output)}
    assert named and named <= in_shard
    if enough:
        order, taken = Order(0, 260, 32, 8), sorted_ids_by_step(output, 2)

        def used(number: int) -> int:
            chain = (order.replacement(number, attempt) for attempt in range(8))
            return number if number not in in_shard else next(i for i in chain if i not in in_shard)

        for step in range(41, 49):
            assert taken[step] == sorted(used(i) for i in order.ids(step - 1).tolist())


@pytest.mark.slow
def test_a_shard_that_is_missing_is_named_before_anything_else(tiny_config, tiny_dataset, tmp_path):
    copy = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    shard = copy / open_manifest(copy).split("train").shards[1].file
    shard.unlink()
    job = start(tiny_config, tmp_path / "run", f"data.path={copy}")
    assert job.wait() == [65]
    assert shard.name in job.text().splitlines()[-1] and "Traceback" not in job.text()
