"""The layouts of a source: that of ImageNet, val from another source, label files; and the memory of a long listing."""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_pipeline.manifest import open_manifest
from data_pipeline.preparation.image_source import Source
from data_pipeline.preparation.listing import add_val, list_source, open_source
from data_pipeline.split import DataError, UsageError
from tests.data_pipeline.images import contents, encoded, make_folder, make_tar, originals, picture, run, stored
from tests.data_pipeline.label_maps import write

WNIDS = ("n01440764", "n01443537", "n02119789")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


class ImageNet:
    """Small copies of the official files: 3 classes of 4 training and 2 validation images."""

    def __init__(self, root: Path):
        self.root = root
        self.train = {
            (wnid, f"{wnid}_{i}.JPEG"): encoded(picture(10 * k + i)) for k, wnid in enumerate(WNIDS) for i in range(4)
        }
        # Not sorted by class, as in the original. The labels come from other files.
        self.val_labels = [2, 0, 1, 1, 0, 2]
        self.val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": encoded(picture(100 + i)) for i in range(6)}
        # The training tar contains one tar per class; its members are not sorted.
        with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
            for wnid in reversed(WNIDS):
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w") as tar:
                    for (of, name), data in reversed(self.train.items()):
                        if of == wnid:
                            add(tar, name, data)
                add(outer, f"{wnid}.tar", inner.getvalue())
        with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
            for name, data in reversed(self.val.items()):
                add(tar, name, data)
        for (wnid, name), data in self.train.items():
            (root / "train" / wnid).mkdir(parents=True, exist_ok=True)
            (root / "train" / wnid / name).write_bytes(data)
        (root / "val").mkdir()
        for name, data in self.val.items():
            (root / "val" / name).write_bytes(data)
        named = [(name, WNIDS[label]) for name, label in zip(self.val, self.val_labels, strict=True)]
        forms = {
            "synset_labels.txt": [wnid for _, wnid in named],
            "pairs.txt": [f"{name} {wnid}" for name, wnid in reversed(named)],
            "caffe.txt": [f"{name} {WNIDS.index(wnid)}" for name, wnid in named],
            "pairs.csv": [f"{name}, {wnid}" for name, wnid in named],
            "LOC_val_solution.csv": [
                "ImageId,PredictionString",
                *(
                    f"{name.removesuffix('.JPEG')},{wnid} 85 1 499 272 {wnid} 3 4 5 6 "
                    for name, wnid in reversed(named)
                ),
            ],
            "ground_truth.txt": [str(label + 1) for label in self.val_labels],
        }
        for name, lines in forms.items():
            (root / name).write_text("\n".join(lines) + "\n")

    def check(self, dest: Path) -> None:
        manifest = open_manifest(dest)
        assert manifest.classes == WNIDS
        assert set(stored(dest, "train")) == {(data, WNIDS.index(wnid)) for (wnid, _), data in self.train.items()}
        assert set(stored(dest, "val")) == set(zip(self.val.values(), self.val_labels, strict=True))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return ImageNet(tmp_path_factory.mktemp("imagenet"))


def test_the_official_tars(imagenet, tmp_path):
    """The tars give the same dataset as the folders."""
    root, labels = imagenet.root, imagenet.root / "synset_labels.txt"
    val = str(root / "ILSVRC2012_img_val.tar")
    run(root / "ILSVRC2012_img_train.tar", tmp_path / "tars", val=val, val_labels=labels)
    imagenet.check(tmp_path / "tars")
    run(root / "train", tmp_path / "folders", val=str(root / "val"), val_labels=labels)
    left_out = ("report.json",)  # it contains the paths of the source
    assert contents(tmp_path / "tars", left_out) == contents(tmp_path / "folders", left_out)


@pytest.mark.parametrize("form", ["pairs.txt", "caffe.txt", "pairs.csv", "LOC_val_solution.csv"])
def test_label_files(imagenet, tmp_path, form):
    root = imagenet.root
    run(root / "train", tmp_path / "set", val=str(root / "val"), val_labels=root / form, workers=1)
    imagenet.check(tmp_path / "set")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "numbers without names, like the ground truth in ImageNet's devkit"),
        ([], "is empty"),
        (["n01440764"] * 5, "has 5 labels for 6 images"),
        ([*["n01440764"] * 5, "n9"], "line 6: there is no class 'n9' in train"),
        (["tench"] * 6, "line 1: there is no class 'tench' in train. A label file has a class name per line"),
        ([f"ILSVRC2012_val_{i:08d}.JPEG n01440764" for i in range(1, 6)], "no label for ILSVRC2012_val_00000006.JPEG"),
        (
            [f"ILSVRC2012_val_{i:08d}.JPEG n01440764" for i in range(1, 9)],
            "labels for 2 images that .*; the first is ILSV",
        ),
        (
            [f"ILSVRC2012_val_{i:08d}.JPEG n9" for i in range(1, 7)],
            "00000001.JPEG has the class 'n9', which train does not have",
        ),
        ([f"ILSVRC2012_val_{i:08d}.JPEG 3" for i in range(1, 7)], "has the class '3', which train does not have"),
        ([f"ILSVRC2012_val_00000001.JPEG {wnid}" for wnid in WNIDS], "has two labels for ILSVRC2012_val_00000001.JPEG"),
    ],
)
def test_label_files_that_do_not_match_the_images(imagenet, tmp_path, lines, message):
    path = imagenet.root / "ground_truth.txt"
    if lines is not None:
        path = tmp_path / "labels.txt"
        path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        run(imagenet.root / "train", tmp_path / "set", val=str(imagenet.root / "val"), val_labels=path)


def test_two_images_of_one_name_are_refused_with_a_label_file(imagenet, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "val" / folder).mkdir(parents=True)
        (tmp_path / "val" / folder / "1.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "labels.txt").write_text("1.jpg n01440764")
    with pytest.raises(DataError, match="b/1.jpg: there are two images of this name"):
        run(imagenet.root / "train", tmp_path / "set", val=str(tmp_path / "val"), val_labels=tmp_path / "labels.txt")


def test_val_in_class_folders_from_another_source(tmp_path):
    folder = make_folder(tmp_path / "pictures")
    val = make_tar(folder / "val", tmp_path / "val.tar")
    run(folder, tmp_path / "together")
    run(folder / "train", tmp_path / "apart", val=str(val))
    left_out = ("report.json",)
    assert contents(tmp_path / "apart", left_out) == contents(tmp_path / "together", left_out)
    assert set(stored(tmp_path / "apart", "val")) == originals(folder, "val")


def test_val_sources_that_do_not_fit_are_refused(tmp_path, imagenet):
    folder = make_folder(tmp_path / "pictures")
    with pytest.raises(UsageError, match="has a val split of its own: leave --val out"):
        run(folder, tmp_path / "set", val=str(folder / "val"))
    with pytest.raises(UsageError, match="has the splits train, val: give one of them"):
        run(folder / "train", tmp_path / "other", val=str(folder))
    with pytest.raises(DataError, match="only train has bird, cat, dog and only val has n01440764"):
        run(folder / "train", tmp_path / "third", val=str(imagenet.root / "train"))
    with pytest.raises(UsageError, match="--val takes a folder or a tar"):
        add_val(list_source(Source("folder", folder / "train")), Source("torchvision", tmp_path, "CIFAR10"), None)


def test_a_flat_val_beside_train_is_not_a_class(imagenet, tmp_path):
    """The layout of Kaggle's CLS-LOC, whose folders train and val must not be read as two classes."""
    for split in ("train", "val"):
        shutil.copytree(imagenet.root / split, tmp_path / "CLS-LOC" / split)
    sentence = r"val do not lie in class folders: give .*/train as the source, with --val .*/val and --val-labels"
    with pytest.raises(DataError, match=sentence):
        run(tmp_path / "CLS-LOC", tmp_path / "set")


@pytest.mark.parametrize("names", [("train", "val"), ("train",), ("train", "valid", "test")])
def test_splits_without_class_folders_are_no_classes(tmp_path, names):
    for name in names:
        write(tmp_path / "photographs" / name / "1.jpg", encoded(picture(1)))
    sentence = f"lie in {', '.join(sorted(names))}, without class folders|val do not lie in class folders"
    with pytest.raises(DataError, match=sentence):
        run(tmp_path / "photographs", tmp_path / "set")


@pytest.mark.parametrize(
    ("stray", "others"),
    [
        ("train/1.jpg", ("train/cat/1.jpg", "val/cat/1.jpg")),
        ("val/1.jpg", ("train/cat/1.jpg", "val/cat/1.jpg")),
        ("train/1.jpg", ("train/cat/1.jpg", "val/cat/1.jpg", "docs/1.jpg")),
        ("Train/1.jpg", ("Train/cat/1.jpg", "test/1.jpg")),
        ("train/1.jpg", ("train/cat/1.jpg",)),
        ("train/1.jpg", ("val/cat/1.jpg",)),
    ],
)
def test_one_stray_image_does_not_make_splits_classes(tmp_path, stray, others):
    for name in (stray, *others):
        write(tmp_path / "photographs" / name, encoded(picture(1)))
    with pytest.raises(DataError, match=f"photographs/{stray} lies in no class folder, as others do: move it away"):
        run(tmp_path / "photographs", tmp_path / "set")


@pytest.mark.parametrize("folders", [("Train", "Val"), ("training", "validation"), ("Train", "valid")])
def test_other_names_of_the_splits(tmp_path, folders):
    for folder in folders:
        for name in ("bee/1.jpg", "cat/1.jpg"):
            write(tmp_path / "photographs" / folder / name, encoded(picture(1)))
    listing = list_source(Source("folder", tmp_path / "photographs"))
    assert listing.classes == ("bee", "cat") and list(listing.splits) == ["train", "val"]
    write(tmp_path / "photographs/train/ant/1.jpg", encoded(picture(1)))
    with pytest.raises(DataError, match=f"several folders of one split, .*{folders[0]}.*: rename all but one"):
        list_source(Source("folder", tmp_path / "photographs"))


@pytest.mark.parametrize("in_tar", [False, True])
@pytest.mark.parametrize("empty", ["train/bird/", "val/bird/", "train/bird/notes.txt", "val/bird/more/notes.txt"])
def test_a_class_folder_without_images_is_an_error(tmp_path, empty, in_tar):
    """Else the classes behind it would get other labels."""
    source = tmp_path / "photographs"
    for name in ("train/ant/1.jpg", "train/cat/1.jpg", "val/ant/1.jpg", "val/cat/1.jpg", "docs/notes.txt"):
        write(source / name, encoded(picture(1)))
    (source / "train/__MACOSX").mkdir()  # of an archive that was made by macOS
    if empty.endswith("/"):
        (source / empty).mkdir()
    else:
        write(source / empty, b"notes")
    if in_tar:
        source = make_tar(source, tmp_path / "photographs.tar")
    with pytest.raises(DataError, match=f"/{'/'.join(empty.split('/')[:2])}.* has no images, but lies where a class"):
        run(source, tmp_path / "set")


def test_a_class_tar_without_images_is_an_error(imagenet, tmp_path):
    path = imagenet.root / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as whole, tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member in whole:
            data = whole.extractfile(member).read()
            add(tar, member.name, bytes(1024) if member.name.startswith("n01443") else data)
    with pytest.raises(DataError, match="a.tar/n01443537 has no images"):
        run(tmp_path / "a.tar", tmp_path / "set")


LINUX, MACOS = "caf\u00e9", "cafe\u0301"  # look the same


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        ((f"{LINUX}/1.jpg", f"{MACOS}/2.jpg"), None),
        ((f"train/{LINUX}/1.jpg", "train/tea/1.jpg", f"val/{MACOS}/2.jpg", "val/tea/2.jpg"), None),
        ((f"{MACOS}/1.jpg", "tea/1.jpg"), f"{LINUX}\n"),
        ((f"{MACOS}/1.jpg", "tea/1.jpg"), f"tea\n{LINUX}\n"),
        ((f"{MACOS}/1.jpg", "tea/1.jpg"), f"1.jpg {LINUX}\n"),
    ],
)
def test_a_class_in_two_forms_of_unicode(tmp_path, folders, labels):
    for name in folders:
        write(tmp_path / "source" / name, encoded(picture(1)))
    with pytest.raises(
        DataError, match="the class name 'caf.{1,2}' is there twice, in Unicode's two forms of the same"
    ):
        listing = list_source(Source("folder", tmp_path / "source"))
        for name in "12"[: labels.count("\n")]:
            write(tmp_path / "val" / f"{name}.jpg", encoded(picture(1)))
        (tmp_path / "labels.txt").write_text(labels)
        add_val(listing, Source("folder", tmp_path / "val"), tmp_path / "labels.txt")


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus/1.jpg", "train/1.jpg", "train/express/2.jpg"):
        write(tmp_path / "photographs" / name, encoded(picture(1)))
    assert list_source(Source("folder", tmp_path / "photographs")).classes == ("bus", "train")


@pytest.mark.parametrize("length", [1300, 1700, 3072])
def test_a_tar_in_the_tar_that_is_cut_off(imagenet, tmp_path, length):
    """Within an image, within a header, and between two files."""
    path = imagenet.root / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as whole, tarfile.open(tmp_path / "cut.tar", "w") as tar:
        for member in whole:
            data = whole.extractfile(member).read()
            add(tar, member.name, data[:length] if member.name.startswith("n01443") else data)
    with pytest.raises(DataError, match=r"n01443537.tar in .*cut.tar is (damaged or )?cut off"):
        run(tmp_path / "cut.tar", tmp_path / "set")


def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path):
    path = make_tar(make_folder(tmp_path / "pictures"), tmp_path / "pictures.tar")
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[-5].offset
    with open(path, "r+b") as file:
        file.seek(offset + 3)
        file.write(b"?")
    with pytest.raises(DataError, match=f"pictures.tar is damaged or cut off: after byte {offset} "):
        run(path, tmp_path / "set")


def test_links_in_a_tar_are_refused(tmp_path):
    folder = make_folder(tmp_path / "pictures", train=2, val=0)
    (folder / "train/cat/twin.jpg").hardlink_to(folder / "train/cat/0.jpg")
    with pytest.raises(DataError, match="is a link: pack the files themselves"):
        run(make_tar(folder, tmp_path / "pictures.tar"), tmp_path / "set")


def test_the_last_of_two_members_of_one_name_is_used(tmp_path):
    first, last = encoded(picture(1)), encoded(picture(2))
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name, data in (("cat", first), ("cat", last), ("dog", first)):
            add(tar, f"{name}/1.jpg", data)
    run(tmp_path / "twice.tar", tmp_path / "set")
    assert set(stored(tmp_path / "set", "train")) == {(last, 0), (first, 1)}


def test_names_are_sorted_as_text(tmp_path):
    """A folder is walked class by class and a tar in its own order; both give the same order."""
    for name in ("a-b/1.jpg", "a/1.jpg", "a/10.jpg", "a/2.jpg", "a.b/é.jpg"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(encoded(picture(1)))
    listing = list_source(open_source(str(tmp_path / "source"), tmp_path))
    assert listing.splits["train"].names == sorted(listing.splits["train"].names)
    assert listing.classes == ("a", "a-b", "a.b")
    from_tar = list_source(open_source(str(make_tar(tmp_path / "source", tmp_path / "source.tar")), tmp_path))
    assert [f"source/{name}" for name in listing.splits["train"].names] == from_tar.splits["train"].names
    assert listing.splits["train"].labels.tolist() == from_tar.splits["train"].labels.tolist()


@pytest.mark.slow
def test_what_a_large_source_costs(tmp_path):
    """Peak memory of listing and planning: about 200 bytes per image, with names as long as those of ImageNet."""
    program = """
import sys
from pathlib import Path
from data_pipeline.preparation.prepare import _plan_split
from data_pipeline.preparation.listing import list_source, open_source
listing = list_source(open_source(sys.argv[1], Path(".")))
plan = _plan_split("train", listing.splits["train"], 1 << 20, 1.0, 0)
assert len(plan.order) == int(sys.argv[2])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    peaks = {}
    for count in (5_000, 55_000):
        path = tmp_path / f"{count}.tar"
        with open(path, "wb") as file:
            entry = tarfile.TarInfo()
            for i in range(count):
                entry.name = f"n{i % 1000:08d}/n{i % 1000:08d}_{i:06d}.JPEG"
                file.write(entry.tobuf(tarfile.USTAR_FORMAT))
            file.write(bytes(1024))
        root = Path(__file__).resolve().parents[3]
        command = [sys.executable, "-c", program, path, str(count)]
        output = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
        peaks[count] = int(output.stdout) * 1024
    per_image = (peaks[55_000] - peaks[5_000]) / 50_000
    print(f"{per_image:.0f} bytes an image")
    assert per_image < 350
