"""prepare and index delete and overwrite only files that they made, and recognise these after being killed."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from data_pipeline.manifest import open_manifest
from data_pipeline.preparation.foreign import index
from data_pipeline.preparation.ownership import MARK, claim, work_folder
from data_pipeline.preparation.verify import verify
from data_pipeline.split import DataError, UsageError
from tests.data_pipeline.images import contents, make_folder, run
from tests.launch.prepare_process import call, command, fails_with

THEIRS = {
    "image.index": b"an index of faiss",
    "00012.tar.tmp": b"an unfinished download",
    "notes.tmp": b"notes",
    "report.jsonl.tmp": b"the user's",
    "train.index.tmp": b"the user's",
    "val.beton": b"the user's",
    "sub/train.index": b"in a folder",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("source") / "pictures")


@pytest.fixture
def shards(pictures, tmp_path) -> Path:
    """A folder with shards of another program and other files of the user."""
    run(pictures, tmp_path / "set", shard_bytes=10_000)
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in (tmp_path / "set").glob("*.tar"):
        shutil.copy(path, folder)
    for name, data in THEIRS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def theirs_are_intact(folder: Path) -> bool:
    return all((folder / name).read_bytes() == data for name, data in THEIRS.items())


def test_index_keeps_the_users_files(shards):
    before = contents(shards)
    for _ in range(2):
        index(shards, workers=1)
        after = contents(shards)
        assert {name: after[name] for name in before} == before and verify(shards) == []
        assert after.keys() - before.keys() == {
            "manifest.json",
            "report.json",
            "report.jsonl",
            "train.index",
            "val.index",
        }


@pytest.mark.parametrize("name", ["report.json", "report.jsonl", "manifest.json", "train.index", "val.index"])
def test_index_is_refused_if_a_name_is_in_use(shards, name):
    """It is refused before anything is read."""
    (shards / name).write_text('{"by": "another program"}')
    before = contents(shards)
    fails_with(
        78, call("index", shards), f"{shards / name} is in the way, and was not made by this program: move it away."
    )
    assert contents(shards) == before and not (shards / ".work").exists()


def test_prepare_is_refused_if_another_program_has_written_a_manifest(pictures, tmp_path):
    for name in ("manifest.json", "report.json"):
        (tmp_path / name).write_text("[1]")
    before = contents(tmp_path)
    fails_with(78, call(pictures, tmp_path), "give another folder, or delete it")
    assert contents(tmp_path) == before


def test_a_dangling_link_is_a_name_in_use(shards, tmp_path):
    (shards / "report.json").symlink_to(tmp_path / "elsewhere")
    with work_folder(shards), pytest.raises(UsageError, match=r"report\.json is in the way"):
        claim(shards, ["report.json"])
    with pytest.raises(DataError, match=r"cannot read .*report\.json: No such file"):  # it may stand for shards
        index(shards, workers=1)
    assert theirs_are_intact(shards)


def test_index_removes_the_index_of_a_split_that_no_longer_exists(shards):
    index(shards, workers=1)
    for path in shards.glob("val-*.tar"):
        path.unlink()
    index(shards, workers=1)
    assert not (shards / "val.index").exists() and list(open_manifest(shards).splits) == ["train"]
    assert theirs_are_intact(shards)


def test_index_again_is_refused_if_the_user_has_taken_a_name_since(shards):
    for path in shards.glob("val-*.tar"):
        path.rename(path.with_suffix(".away"))
    index(shards, workers=1)
    for path in shards.glob("val-*.away"):
        path.rename(path.with_suffix(".tar"))
    (shards / "val.index").write_text("the user's")
    with pytest.raises(UsageError, match=r"val\.index is in the way"):
        index(shards, workers=1)
    assert (shards / "val.index").read_text() == "the user's" and verify(shards) == []


@pytest.mark.parametrize("what", ["prepare", "index"])
def test_a_work_folder_of_another_program_is_not_used(pictures, shards, tmp_path, what):
    dest = shards if what == "index" else tmp_path / "new"
    (dest / ".work").mkdir(parents=True)
    for name in ("lock", "x.tmp", "thesis.txt"):
        (dest / ".work" / name).write_text("mine")
    before = contents(dest)
    with pytest.raises(UsageError, match=r"\.work was not made here by this program"):
        index(dest, workers=1) if what == "index" else run(pictures, dest)
    assert contents(dest) == before


def test_a_work_folder_that_is_a_link_is_not_used(pictures, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.work").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"\.work was not made here by this program"):
        run(pictures, tmp_path / "new")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_work_folder_that_came_with_a_dataset_is_not_trusted(shards, tmp_path):
    """It could claim files of the user and forge the contents of shards."""
    (tmp_path / "thesis.txt").write_text("mine")
    (shards / ".work").mkdir()
    (shards / ".work" / MARK).write_text("/where/a/stranger/made/it")
    (shards / ".work/claimed.json").write_text('["../thesis.txt", "image.index"]')
    with pytest.raises(UsageError, match=r"\.work was not made here"):
        index(shards, workers=1)
    assert theirs_are_intact(shards) and (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_mark_that_is_a_link_is_not_written_through(pictures, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "new/.work").mkdir(parents=True)
    (tmp_path / "new/.work" / MARK).symlink_to(tmp_path / "thesis.txt")
    run(pictures, tmp_path / "new")
    assert (tmp_path / "thesis.txt").read_text() == "mine" and verify(tmp_path / "new") == []


def test_foreign_files_in_the_work_folder_are_kept(pictures, tmp_path):
    dest = tmp_path / "new"
    (dest / ".work").mkdir(parents=True)
    (dest / ".work" / MARK).write_text(str(dest.resolve()))
    (dest / ".work/thesis.txt").write_text("mine")
    run(pictures, dest)
    assert verify(dest) == [] and [path.name for path in (dest / ".work").iterdir()] == ["thesis.txt"]


def test_what_another_process_put_beside_it_is_no_error(tmp_path):
    with work_folder(tmp_path / "new" / "set"):
        (tmp_path / "new" / "other").mkdir()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]


def test_a_run_without_results_leaves_nothing(tmp_path):
    """A folder that was there stays."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "there").mkdir()
    for dest in ("new/set", "there"):
        with pytest.raises(DataError, match="contains no images"):
            run(tmp_path / "empty", tmp_path / dest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "there"]
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.slow
def test_an_ffcv_file_of_the_user_is_not_overwritten(pictures, tmp_path):
    pytest.importorskip("ffcv")
    run(pictures, tmp_path / "set")
    (tmp_path / "set/val.beton").write_text("mine")
    with pytest.raises(UsageError, match=r"val\.beton is in the way"):
        run(pictures, tmp_path / "set", beton_mode="jpeg")
    assert (tmp_path / "set/val.beton").read_text() == "mine" and not (tmp_path / "set/train.beton").exists()


@pytest.mark.skipif(shutil.which("strace") is None, reason="killing at a system call needs strace")
@pytest.mark.parametrize(
    "change", [pytest.param("rename", marks=pytest.mark.slow), pytest.param("unlink", marks=pytest.mark.long)]
)
def test_index_continues_after_being_killed_at_any_rename_or_unlink(shards, tmp_path, change):
    """Replace an index with another split, killed at the first, second, … call, until a run makes fewer calls."""
    index(shards, workers=1)
    for path in shards.glob("val-*.tar"):
        path.rename(path.with_name(path.name.replace("val", "test")))
    whole = shutil.copytree(shards, tmp_path / "whole")
    index(whole, workers=1)
    for number in range(1, 40):
        half = shutil.copytree(shards, tmp_path / f"half{number}")
        inject = f"inject={change}:signal=KILL:when={number}"
        strace = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={change}", "-e", inject]
        killed = [*strace, *command("index", half, "--workers", 1)]
        result = subprocess.run(killed, capture_output=True, text=True, timeout=200)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL and theirs_are_intact(half), result.stderr
        index(half, workers=1)
        same = ("manifest.json", "train.index", "test.index", "report.json", "report.jsonl")
        after = contents(half)
        assert {name: after[name] for name in same} == {name: contents(whole)[name] for name in same}, number
        assert theirs_are_intact(half) and not (half / ".work").exists() and not (half / "val.index").exists(), number
        shutil.rmtree(half)
    assert number > 4
