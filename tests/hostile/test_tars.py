"""Untrusted tars, folders and labels: prepare and index end with one sentence or leave a sample out with a reason.

They write nothing outside DEST, execute nothing, and give no label that is out of range.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from data_pipeline.manifest import open_manifest
from data_pipeline.preparation import tars
from data_pipeline.preparation.foreign import index
from data_pipeline.preparation.image_source import Source
from data_pipeline.preparation.labels import read_labels
from data_pipeline.preparation.listing import list_source, open_source
from data_pipeline.preparation.tars import tar_files
from data_pipeline.split import DataError, UsageError
from tests.data_pipeline.images import encoded, listed, picture, run, stored
from tests.data_pipeline.jpegs import corpus

GOOD = encoded(picture(1), quality=90)
ROOT = Path(__file__).resolve().parents[2]


def header(name: bytes, size: int | bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A tar header with arbitrary fields. size: a number, or the 12 bytes of the field."""
    field = b"%011o\0" % size if isinstance(size, int) else size
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8
    block += kind + link.ljust(100, b"\0")
    block = (block + b"ustar\x0000").ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: str, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name.encode(), len(data), kind) + data + bytes(-len(data) % 512)


def pax(**records: str) -> bytes:
    text = b""
    for key, value in records.items():
        body = f" {key.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(body), len(body) + 9) if n == len(body) + len(str(n)))
        text += str(length).encode() + body
    return member("pax", text, b"x")


def base256(number: int) -> bytes:
    return (b"\x80" if number >= 0 else b"\xff") + (number % (1 << 88)).to_bytes(11, "big")


END = bytes(1024)
IMAGE = member("a/1.jpg", GOOD)
HOSTILE_TARS = {
    "a name outside": (member("a/../../b/1.jpg", GOOD), "has an image with a path outside itself"),
    "a link to a file": (header(b"a/2.jpg", 0, b"2", b"/etc/passwd"), "is a link"),
    "a hard link": (header(b"a/2.jpg", 0, b"1", b"../../x"), "is a link"),
    "a device": (header(b"a/2.jpg", 0, b"3"), "is not a plain file"),
    "a block device": (header(b"a/2.jpg", 0, b"4"), "is not a plain file"),
    "a pipe": (header(b"a/2.jpg", 0, b"6"), "is not a plain file"),
    "a line break in a name": (member("a\nb/2.jpg", GOOD), "control characters"),
    "an escape in a name": (member("a/\x1b[2J.jpg", GOOD), "control characters"),
    "8 GB": (header(b"a/2.jpg", b"77777777777\0"), "is cut off"),
    "2^80 bytes": (header(b"a/2.jpg", base256(1 << 80)), "is cut off"),
    "2^80 bytes of a pipe's": (header(b"a/pipe", base256(1 << 80), b"y"), "is cut off"),
    "less than nothing": (header(b"a/2.jpg", base256(-512)), "is not a whole tar"),
    "far back": (header(b"a/2.jpg", base256(-(1 << 40))), "is not a whole tar"),
    "less than nothing, by pax": (pax(size="-1024") + member("a/2.jpg", GOOD), "is damaged|not a whole tar"),
    "more than there is, by pax": (pax(size=str(1 << 70)) + member("a/2.jpg", GOOD), "is cut off"),
    "sparse, without a map": (pax(GNU__sparse__realsize="1500") + member("a/2.jpg", GOOD[:100]), "is damaged"),
    "sparse": (pax(GNU__sparse__size="1500") + member("a/2.jpg", GOOD[:100]), "is damaged|is not a plain file"),
    "sparse, as no number": (pax(GNU__sparse__size="x") + member("a/2.jpg", GOOD), "is not a whole tar"),
    "a number of many digits": (pax(GNU__sparse__realsize="9" * 5000) + member("a/2.jpg", GOOD), "is not a whole tar"),
    "a record of no length": (member("pax", b"0 a=b\n", b"x") + IMAGE, "damaged|not a whole tar"),
    "a long name of 8 GB": (header(b"long", b"77777777777\0", b"L") + IMAGE, "is not a whole tar"),
    "a pax header of 1 MB": (member("pax", b"1" * (1 << 20), b"x") + IMAGE, "is not a whole tar"),
    "a pax header of digits": (member("pax", b"1" * 60_000, b"x") + IMAGE, "has a number of 99 digits"),
    "names of names": (member("long", b"x", b"L") * 3000 + IMAGE, "is not a whole tar"),
    "a pax header before itself": (pax(path="b/1.jpg") * 3000 + IMAGE, "is not a whole tar"),
}


@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_hostile_tars_are_refused_in_one_sentence(tmp_path, name):
    """By the listing of prepare, and by tar_files, which index uses."""
    data, message = HOSTILE_TARS[name]
    path = tmp_path / "hostile.tar"
    path.write_bytes(IMAGE + data + END)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message) as raised:
        list_source(open_source(str(path), tmp_path))
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)
    with pytest.raises(DataError, match=message), open(path, "rb") as file:
        list(tar_files(path, file, 0, path.stat().st_size))
    assert sorted(tmp_path.rglob("*")) == before


def test_absolute_names_and_double_slashes_are_normalised_as_by_tar(tmp_path):
    names = ("/cats/1.jpg", "cats//2.jpg", "./dogs/./3.jpg")
    (tmp_path / "a.tar").write_bytes(b"".join(member(name, GOOD) for name in names) + END)
    listing = list_source(open_source(str(tmp_path / "a.tar"), tmp_path))
    assert listing.classes == ("cats", "dogs")
    assert listing.splits["train"].names == ["cats/1.jpg", "cats/2.jpg", "dogs/3.jpg"]


def test_only_one_level_of_nested_tars_is_read(tmp_path):
    """ImageNet's own file has one level."""
    inner = member("1.jpg", GOOD) + END
    nested = inner
    for _ in range(50):
        nested = member("deeper.tar", nested) + END
    classes = member("cat.tar", member("bomb.tar", nested) + inner) + member("dog.tar", inner)
    (tmp_path / "a.tar").write_bytes(classes + END)
    listing = list_source(open_source(str(tmp_path / "a.tar"), tmp_path))
    assert listing.splits["train"].names == ["cat/1.jpg", "dog/1.jpg"] and listing.ignored == 1


def test_a_compressed_bomb_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    """The limit of 4 GiB is lowered, so that the test writes less."""
    monkeypatch.setattr(tars, "ALWAYS_ALLOWED", 1 << 20)
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(300):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 19
    with pytest.raises(DataError, match="bomb.tar.gz grows from .* decompress it yourself"):
        run(path, tmp_path / "set")
    assert not list((tmp_path / "set").rglob("*.t*"))


@pytest.mark.parametrize("name", ["a.zip", "a.7z", "a.rar", "a.tar"])
def test_other_archives_are_refused(tmp_path, name):
    path = tmp_path / name
    if name == "a.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../cat/1.jpg", GOOD)
    else:
        magic = {"a.7z": b"7z\xbc\xaf\x27\x1c", "a.rar": b"Rar!\x1a\x07", "a.tar": b"\x1f\x8b"}
        path.write_bytes(magic[name] + bytes(2000))
    with pytest.raises(DataError, match="is not a whole tar archive|cannot be decompressed|contains no images"):
        run(path, tmp_path / "set")


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folders_with_pipes_devices_and_circular_links_are_refused(tmp_path):
    (tmp_path / "set/cat").mkdir(parents=True)
    (tmp_path / "set/cat/1.jpg").write_bytes(GOOD)
    (tmp_path / "set/cat/again").symlink_to(tmp_path / "set")
    with pytest.raises(DataError, match="again is a link to a folder that contains it"):
        list_source(Source("folder", tmp_path / "set"))
    (tmp_path / "set/cat/again").unlink()
    os.mkfifo(tmp_path / "set/cat/2.jpg")
    with pytest.raises(DataError, match=r"2\.jpg is not a regular file"):
        list_source(Source("folder", tmp_path / "set"))
    (tmp_path / "set/cat/2.jpg").unlink()
    (tmp_path / "set/cat/2.jpg").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"2\.jpg is not a regular file"):
        list_source(Source("folder", tmp_path / "set"))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\x85b", os.fsdecode(b"caf\xe9")])
def test_class_names_with_control_characters_are_refused(tmp_path, name):
    (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set" / name / "1.jpg").write_bytes(GOOD)
    with pytest.raises(DataError, match="control characters") as raised:
        list_source(Source("folder", tmp_path / "set"))
    str(raised.value).encode()  # raises if the message cannot be written to a log
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


def test_a_shard_with_control_characters_in_a_name_is_refused(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(IMAGE + member("a/\x1b[2J.cls", b"0") + END)
    with pytest.raises(DataError, match=r"train-0.tar has a file whose name has control characters: 'a/\\x1b\[2J.cls'"):
        index(tmp_path, workers=1)


def test_a_huge_file_is_left_out_before_it_is_read(tmp_path):
    for name in ("cat/1", "cat/2", "dog/3"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"set/{name}.jpg").write_bytes(GOOD)
    os.truncate(tmp_path / "set/cat/2.jpg", 1 << 40)  # a sparse file
    run(tmp_path / "set", tmp_path / "out", shard_bytes=1 << 45)
    assert listed(tmp_path / "out")["cat/2.jpg"] == ("excluded", "1099511627776 bytes, more than 1073741824")
    assert sorted(stored(tmp_path / "out", "train")) == [(GOOD, 0), (GOOD, 1)]


# --- labels ----------------------------------------------------------------------------------------------------------

LABELS = {  # key: (the .cls, the .json, part of the reason)
    "digits": (b"9" * 5000, None, "no label: '999.* has 5000 characters|its label cannot be read"),
    "huge": (b"9" * 40, None, "no label: 9999"),
    "negative": (b"-3", None, "no label: -3"),
    "nothing": (b" \n", None, "no label: '' is empty"),
    "no text": (b"\xff\xfe", None, "its label cannot be read"),
    "escape": (b"\x1b[2Jcat", None, "has control characters"),
    "line": (b"cat\ndog", None, "has control characters"),
    "long": (b"c" * 501, None, "has 501 characters"),
    "nested": (None, b"[" * 100_000 + b"]" * 100_000, "its label cannot be read: RecursionError"),
    "nested object": (None, b'{"label":' * 50_000 + b"1" + b"}" * 50_000, "its label cannot be read: RecursionError"),
    "a number of digits": (None, b'{"label": ' + b"9" * 5000 + b"}", "its label cannot be read"),
    "a huge number": (None, b'{"label": ' + b"9" * 4000 + b"}", "no label: 999"),
    "infinity": (None, b'{"label": 1e999}', "no label: inf"),
    "no number": (None, b'{"label": NaN}', "no label: nan"),
    "half": (None, b'{"label": 0.5}', "no label: 0.5"),
    "true": (None, b'{"label": true}', "no label: True"),
    "a list": (None, b'{"label": [[[]]]}', "no label: "),
    "a surrogate": (None, rb'{"label": "\ud800"}', "not UTF-8"),
    "no object": (None, b'"label"', "its label cannot be read"),
    "a list of labels": (None, b"[1, 2]", "no label"),
    "16 MB": (None, b'{"label": 0, "text": "' + b"x" * (1 << 24) + b'"}', "more than 16777216"),
}


def test_samples_with_invalid_labels_are_left_out_with_a_reason(tmp_path):
    with open(tmp_path / "train-0.tar", "wb") as file:
        for key, (word, fields, _) in LABELS.items():
            file.write(member(f"{key}.jpg", GOOD))
            for ending, data in (("cls", word), ("json", fields)):
                if data is not None:
                    file.write(member(f"{key}.{ending}", data))
        file.write(
            member("441.jpg", corpus("441")) + member("441.cls", b"0") + member("scans.jpg", corpus("scans_501"))
        )
        file.write(member("scans.cls", b"0") + member("good.jpg", GOOD) + member("good.cls", b"1") + END)
    index(tmp_path, workers=1)
    report = listed(tmp_path)
    assert report.keys() == {f"train-0.tar/{key}" for key in [*LABELS, "441", "scans"]}
    for key, (_, _, words) in LABELS.items():
        outcome, why = report[f"train-0.tar/{key}"]
        assert outcome == "excluded" and re.search(words, why) and len(why) < 1200, (key, why)
    assert "unusual chroma sampling" in report["train-0.tar/441"][1]
    assert "more than 500 scans" in report["train-0.tar/scans"][1]
    assert stored(tmp_path, "train") == [(GOOD, 1)] and open_manifest(tmp_path).classes == ("0", "1")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u200b", "\t"])
def test_unicode_line_separators_do_not_shift_labels(tmp_path, character):
    """str.splitlines would split lines there, in classes.txt and in a label file."""
    names = ["ant", f"b{character}ee", "cat"]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/classes.txt").write_text("\r\n".join(names) + "\n\n")
    (tmp_path / "shards/train-0.tar").write_bytes(member("1.jpg", GOOD) + member("1.cls", b"cat") + END)
    index(tmp_path / "shards", workers=1)
    assert open_manifest(tmp_path / "shards").classes == tuple(names)
    assert stored(tmp_path / "shards", "train") == [(GOOD, 2)]

    (tmp_path / "labels.txt").write_text("\n".join(names))
    labels = read_labels(tmp_path / "labels.txt", ["1.jpg", "2.jpg", "3.jpg"], tuple(sorted(names)))
    assert labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant\n\ncat\n", r"classes\.txt, line 2 is empty"),
        ("ant\nb\x85ee\ncat\n", "control characters"),
        ("ant\nb\x1cee\ncat\n", "control characters"),
        ("ant\nb\x1b[2J\ncat\n", "control characters"),
    ],
)
def test_an_invalid_classes_file_is_refused_before_shards_are_read(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    (tmp_path / "train-0.tar").write_bytes(member("1.jpg", GOOD) + member("1.cls", b"cat") + END)
    with pytest.raises(DataError, match=message):
        index(tmp_path, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.txt", "train-0.tar"]


def test_class_names_may_look_like_paths(tmp_path):
    """A class name is never used as a path."""
    words = ["../../evil", "/etc/cron.d/evil", "n/a", "CON", "a;rm -rf b", "$(touch evil)", "<script>"]
    with open(tmp_path / "train-0.tar", "wb") as file:
        for number, word in enumerate(words):
            file.write(member(f"{number}.jpg", GOOD) + member(f"{number}.cls", word.encode()))
        file.write(END)
    index(tmp_path, workers=1)
    assert open_manifest(tmp_path).classes == tuple(sorted(words))
    assert not list(tmp_path.parent.rglob("*evil*"))


def test_an_untrusted_manifest_cannot_make_index_delete_files(tmp_path):
    """Its splits have names that are paths, and a report claims that `index` wrote it."""
    (tmp_path / "mine.index").write_text("my own")
    folder = tmp_path / "set"
    folder.mkdir()
    entry = {"samples": 1, "fingerprint": "0" * 64, "shards": []}
    splits = {name: entry for name in ("../mine", str(tmp_path / "mine"), "image")}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "classes": ["a"], "splits": splits}))
    (folder / "report.json").write_text(json.dumps({"arguments": {"index": True}}))
    (folder / "image.index").write_text("of another program")
    (folder / "train-0.tar").write_bytes(IMAGE + member("a/1.cls", b"0") + END)
    with pytest.raises(UsageError, match=r"manifest\.json is in the way, and was not made by this program"):
        index(folder, workers=1)
    assert (tmp_path / "mine.index").read_text() == "my own"
    assert (folder / "image.index").read_text() == "of another program"


# --- transient faults ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("strace") is None, reason="making system calls fail needs strace")
def test_a_file_with_a_stale_handle_is_opened_again(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(IMAGE + END)
    program = """
import sys
from data_pipeline.preparation.listing import Path, Source, read_image
print(len(read_image(Source("tar", Path(sys.argv[1])), "a/1.jpg", 512, 400)))
"""
    log = tmp_path / "log"
    strace = ["strace", "-qq", "-o", str(log), "-P", str(path), "-e", "inject=pread64:error=ESTALE:when=1..2"]
    command = [*strace, sys.executable, "-c", program, path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.stdout == "400\n", result.stderr
    assert log.read_text().count("ESTALE") == 2 and log.read_text().count("openat") == 3
