"""A segmenter learns: the quickstart's recipe on fewer scenes, on two ranks. The whole: test_dense_guides.py."""

import pytest

from tests.runs import ROOT, metrics, run

pytestmark = pytest.mark.long


def test_the_quickstart_learns_the_shapes(tmp_path):
    import sys

    sys.path.insert(0, str(ROOT / "examples"))
    from draw_segments import draw_dataset

    from data_pipeline.preparation.prepare import prepare

    draw_dataset(tmp_path / "scenes", train=1000, val=40, seed=0)
    prepare(str(tmp_path / "scenes"), tmp_path / "data", workers=2, shard_bytes=10**8, val_fraction=0.0, seed=0)
    config = ROOT / "configs/segment_quickstart.yaml"
    run(config, tmp_path / "run", f"data.path={tmp_path / 'data'}", "train.epochs=3", world=2, timeout=600)
    first, *_, last = (line["miou"] for line in metrics(tmp_path / "run", "eval") if line["weights"] == "ema")
    assert last > first and last > 50
