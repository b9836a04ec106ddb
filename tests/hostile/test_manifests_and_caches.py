"""What a stranger's dataset, or another user of the machine, can do: make the program stop with a sentence, and nothing else."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import faults
from data_pipeline.backends import open_backend
from data_pipeline.backends.stored import StoredSamples
from data_pipeline.config import AugmentConfig, DataConfig, without_secrets
from data_pipeline.faults import StorageError
from data_pipeline.loader import build_loader, evaluation_batches
from data_pipeline.manifest import DataError, Shard, Split, UsageError, open_manifest, sha256_of, write_manifest
from data_pipeline.order import Order
from data_pipeline.storage import open_dataset
from tests.data_pipeline.shards import jpeg, write_split
from tests.data_pipeline.staging import Handler, Server, config, fork, open_files, read_one, stage_in_a_process, staged
from tests.runs import ROOT

SAMPLES = 12
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


@pytest.fixture
def dataset(tmp_path) -> Path:
    """3 shards of 4 images."""
    write_split(tmp_path / "dataset", [jpeg(number, 40, 36) for number in range(SAMPLES)], per_shard=4)
    return tmp_path / "dataset"


def rewrite(dataset: Path, change) -> None:
    document = json.loads((dataset / "manifest.json").read_text())
    change(document)
    (dataset / "manifest.json").write_text(json.dumps(document))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(split: Split) -> list[bytes]:
    """The bytes of all samples; none may be bad."""
    encoded, failures = open_backend("webdataset", split).stored.read(np.arange(split.samples))
    assert failures == {}
    return encoded


# --- manifests -------------------------------------------------------------------------------------------------------------------------


def shard(**fields):
    return lambda document: document["splits"]["train"]["shards"][1].update(fields)


def split_entry(**fields):
    return lambda document: document["splits"]["train"].update(fields)


def renamed(name: str):
    return lambda document: document["splits"].update({name: document["splits"].pop("train")})


HOSTILE = {
    "absolute": shard(file="/tmp/evil.pth"),
    "upwards": shard(file="../../evil.pth"),
    "upwards, inside": shard(file="a/../../evil.pth"),
    "not normal": shard(file="a/./b.tar"),
    "the folder": shard(file="."),
    "empty": shard(file=""),
    "NUL": shard(file="a\0b"),
    "escape": shard(file="a\x1b[2Jb"),
    "no text": shard(file="a\ud800b"),
    "no string": shard(file=["a"]),
    "twice": shard(file="train-00000.tar"),
    "an index": shard(file="train.index"),
    "the manifest": shard(file="manifest.json"),
    "a file as folder": shard(file="train-00000.tar/b.tar"),
    "split upwards": renamed("../train"),
    "split absolute": renamed("/tmp/train"),
    "split of nothing": renamed(""),
    "split hidden": renamed(".train"),
    "samples text": split_entry(samples="12"),
    "samples float": split_entry(samples=12.0),
    "samples true": split_entry(samples=True),
    "samples negative": split_entry(samples=-12),
    "samples huge": split_entry(samples=10**30),
    "samples none": split_entry(samples=0, shards=[]),
    "samples that do not add up": split_entry(samples=13),
    "bytes negative": shard(bytes=-1),
    "bytes huge": shard(bytes=2**63),
    "hash short": shard(sha256="abc"),
    "hash number": split_entry(fingerprint=7),
    "shards no list": split_entry(shards=7),
    "unknown field": shard(command="rm"),
    "no classes": lambda document: document.update(classes=[]),
    "classes numbers": lambda document: document.update(classes=[1, 2]),
    "classes text": lambda document: document.update(classes="abc"),
    "splits a list": lambda document: document.update(splits=[]),
    "beton mode": split_entry(beton={"file": "b", "bytes": 1, "sha256": "0" * 64, "mode": "exec", "fingerprint": "0" * 64}),
    "beton upwards": split_entry(beton={"file": "../b", "bytes": 1, "sha256": "0" * 64, "mode": "raw", "fingerprint": "0" * 64}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_one_sentence(dataset, tmp_path, change):
    rewrite(dataset, change)
    before = contents(tmp_path)
    for attempt in (lambda: open_manifest(dataset), lambda: open_dataset(config(f"file://{dataset}", tmp_path / "cache"))):
        with pytest.raises(DataError, match=r"manifest\.json is damaged \(.*\)\. Prepare the dataset again\.$"):
            attempt()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"version": 1}', "null", "\ufeff{}", ""])
def test_what_is_hardly_json(dataset, text):
    (dataset / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json (is damaged|has format version)"):
        open_manifest(dataset)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("label", 2**30 + 2, "its class is none of the 10"),
        ("label", 10, "its class is none of the 10"),
        ("shard", 3, "it lies outside the files"),
        ("shard", 2**32 - 1, "it lies outside the files"),
        ("offset", 2**63, "it lies outside the files"),
        ("offset", 2**64 - 1, "it lies outside the files"),
        ("size", 2**32 - 1, "it lies outside the files"),
        ("width", 0, "it has no pixels"),
    ],
)
def test_an_index_that_says_what_cannot_be(dataset, tmp_path, field, value, sentence):
    """With the right hash: it is the one who made it that is not to be trusted."""
    path = dataset / "train.index"
    records = np.array(open_manifest(dataset).split("train").records)
    records[field][7] = value
    records.tofile(path)
    rewrite(dataset, split_entry(fingerprint=sha256_of(path)))
    for data in (config(dataset), config(dataset, tmp_path / "cache")):
        with pytest.raises(DataError, match=rf"train\.index cannot be right: of sample 7 it says that {sentence}"):
            open_dataset(data)


def test_a_flipped_bit_in_an_index_is_found_at_the_start(dataset):
    flip_a_bit(dataset / "train.index", 16)  # of the first label
    with pytest.raises(DataError, match=r"train\.index is damaged: its SHA-256 is not the manifest's\. Copy it again"):
        open_dataset(config(dataset))


def test_one_process_of_a_node_looks(dataset, monkeypatch):
    (dataset / "train-00001.tar").unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    open_dataset(config(dataset))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DataError, match=r"train-00001\.tar is missing"):
        open_dataset(config(dataset))


def test_the_doctor_chooses_samples_of_a_billion_in_little_memory(dataset):
    from train.doctor.files import sample_ids

    small = StoredSamples(open_manifest(dataset).split("train"))
    ids = sample_ids(small, 2, 0)
    assert len(set(ids.tolist())) == 8 and len(set(small.records["shard"][ids].tolist())) == 2
    shards = tuple(Shard(f"{number}.tar", 10_000, 1, "") for number in range(100_000))
    large = StoredSamples(Split(dataset, "train", 10**9, "", shards))
    tracemalloc.start()
    ids = sample_ids(large, 16, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(ids.tolist())) == 256 and len(set((ids // 10_000).tolist())) <= 16
    assert peak < 20e6


# --- a cache touches nothing but its own -----------------------------------------------------------------------------------------------


def test_a_cache_with_a_limit_leaves_a_users_files_alone(dataset, tmp_path):
    cache = tmp_path / "cache"
    foreign = ["results/thesis.pdf", "results/run.12.part", "notes.lock", "results/train-00000.tar", "0123456789abcdef/train-00000.tar"]
    for name in foreign:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(os.urandom(100_000))
        os.utime(cache / name, (1, 1))  # older than anything else
    before = contents(cache)
    shard_size = max(path.stat().st_size for path in dataset.glob("*.tar"))
    data = config(dataset, cache, cache_gb=(1000 + 1.5 * shard_size) / 1e9)
    split = open_dataset(data, training=False).split("train")
    own = next(cache.glob("cat-cache-*"))
    (split.folder / "by hand").write_bytes(bytes(100_000))
    (split.folder.with_name("parts")).joinpath("by hand").write_bytes(bytes(100_000))
    for number in (0, 1, 2):
        assert read_one(split, number) == (dataset / split.shards[number].file).read_bytes()
    assert staged(cache) == {"by hand", "train.index", "train-00002.tar"}
    assert [path.name for path in own.glob("*/parts/*")] == ["by hand"]
    assert {path: data for path, data in contents(cache).items() if own not in path.parents} == before


def test_a_folder_that_is_no_cache_is_refused(dataset, tmp_path):
    folder = tmp_path / "cache" / f"cat-cache-{os.geteuid()}"
    folder.mkdir(parents=True)
    (folder / "thesis.pdf").write_text("years")
    with pytest.raises(UsageError, match=r"cat-cache-\d+ is no cache, as there is no CACHEDIR\.TAG in it: choose another data\.cache_dir"):
        open_dataset(config(dataset, tmp_path / "cache"))
    assert (folder / "thesis.pdf").read_text() == "years"


@pytest.mark.parametrize("how", ["link", "writable", pytest.param("owner", marks=needs_root)])
def test_a_cache_that_another_user_has_prepared_is_refused(dataset, tmp_path, how):
    """As anybody can in /tmp, before the first start."""
    folder, elsewhere = tmp_path / "cache" / f"cat-cache-{os.geteuid()}", tmp_path / "elsewhere"
    folder.parent.mkdir()
    elsewhere.mkdir(mode=0o700)
    if how == "link":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir(mode=0o700)
        folder.chmod(0o777) if how == "writable" else os.chown(folder, 65534, 65534)
    with pytest.raises(UsageError, match=r"cat-cache-\d+ was not made by you, or others may write to it"):
        open_dataset(config(dataset, tmp_path / "cache"))
    assert not list(elsewhere.iterdir())


def test_a_cache_is_closed_to_others_and_marked(dataset, tmp_path):
    open_dataset(config(dataset, tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


def stage_as(user: int, data: DataConfig) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    stage_in_a_process(data, [0, 1, 2])
    split = open_dataset(data, training=False).split("train")
    assert not any(batch.bad for _, batch in evaluation_batches(data, split, 5))


@needs_root
def test_two_users_share_a_cache_folder(dataset):
    """One after the other and at once; with a limit, too, under which each makes room for its own files only."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(dataset, folder / "dataset")
        (folder / "cache").mkdir()
        (folder / "cache").chmod(0o1777)
        size = sum(path.stat().st_size for path in dataset.glob("train*"))
        for limit in (None, 1.1 * size / 1e9):
            data = config(folder / "dataset", folder / "cache", cache_gb=limit)
            processes = [fork.Process(target=stage_as, args=(user, data)) for user in (65533, 65534, 65533)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(120)
            assert [process.exitcode for process in processes] == [0, 0, 0]
        assert {path.name for path in (folder / "cache").iterdir()} == {"cat-cache-65533", "cat-cache-65534"}


@needs_root
def test_a_cache_folder_of_another_user_is_one_sentence(dataset):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(dataset, folder / "dataset")
        (folder / "cache").mkdir(mode=0o755)
        code = "from data_pipeline.storage import *; open_dataset(DataConfig(path={!r}, cache_dir={!r}))"
        command = [sys.executable, "-c", code.format(str(folder / "dataset"), str(folder / "cache"))]
        nobody = ["setpriv", "--reuid=65534", "--clear-groups"]
        result = subprocess.run([*nobody, *command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HOME": "/"})
        assert f"UsageError: data.cache_dir {folder}/cache cannot be used: Permission denied." in result.stderr


# --- damage on the node's disk -----------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped", "cut off"])
def test_a_damaged_file_of_the_cache_is_fetched_again(dataset, tmp_path, damage):
    data = config(dataset, tmp_path / "cache")
    split = open_dataset(data).split("train")
    expected = everything(split)
    place = int(split.records["offset"][5]) + 100
    path = split.folder / "train-00001.tar"
    flip_a_bit(path, place) if damage == "flipped" else os.truncate(path, place)
    stored = open_backend("webdataset", open_dataset(data).split("train")).stored
    assert stored.read(np.arange(SAMPLES)) == (expected, {})
    assert [(fault.file, fault.error) for fault in stored.take_faults()] == [(str(path), "damaged on this node's disk, and fetched again")]
    assert path.read_bytes() == (dataset / path.name).read_bytes()


def test_a_damaged_index_of_the_cache_is_fetched_again(dataset, tmp_path):
    data = config(dataset, tmp_path / "cache")
    split = open_dataset(data).split("train")
    flip_a_bit(split.index_path, 16)
    assert open_dataset(data).split("train").records["label"].tolist() == [number % 10 for number in range(SAMPLES)]


def test_a_sample_that_was_packed_damaged_stays_bad_and_costs_one_look(dataset, tmp_path):
    """Its file is the manifest's, so another copy would not help."""
    records = np.array(open_manifest(dataset).split("train").records)
    records["checksum"][[5, 6]] ^= 1
    records.tofile(dataset / "train.index")
    rewrite(dataset, split_entry(fingerprint=sha256_of(dataset / "train.index")))
    split = open_dataset(config(dataset, tmp_path / "cache")).split("train")
    stored = open_backend("webdataset", split).stored
    inode = None
    for _ in range(2):
        assert list(stored.read(np.arange(SAMPLES))[1]) == [5, 6]
        assert inode in (None, (split.folder / "train-00001.tar").stat().st_ino)
        inode = (split.folder / "train-00001.tar").stat().st_ino
    assert stored.take_faults() == ()


# --- descriptors -----------------------------------------------------------------------------------------------------------------------


def test_every_loader_closes_its_files(dataset):
    split = open_manifest(dataset).split("train")
    data = config(dataset)
    for _ in range(3):
        assert len(list(evaluation_batches(data, split, 5))) == 3
        with build_loader(data, AugmentConfig(), split, Order(1, SAMPLES, 4, 2)) as loader:
            next(loader)
        assert not [path for path in open_files(os.getpid()) if path.endswith(".tar")]


def read_with_few_descriptors(folder: Path, left: int) -> None:
    import resource

    split = open_manifest(folder).split("train")
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + left,) * 2)
    data = config(folder)
    for _ in range(2):
        assert not any(batch.bad for _, batch in evaluation_batches(data, split, 8))


@pytest.mark.parametrize("left", [12, 60])
def test_few_descriptors_and_many_shards(tmp_path, left):
    write_split(tmp_path, [jpeg(number, 16, 16) for number in range(100)], per_shard=1)
    process = fork.Process(target=read_with_few_descriptors, args=(tmp_path, left))
    process.start()
    process.join(120)
    assert process.exitcode == 0


# --- addresses ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve():
    servers = []

    def start(folder: Path, handler: type = Handler) -> Server:
        server = Server(folder)
        server.RequestHandlerClass = lambda *arguments: handler(*arguments, directory=str(folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_names_that_mean_something_in_an_address(dataset, tmp_path, serve):
    names = ["a#1?x=%20.tar", "b c%2F/d&é.tar", "e+f;g=h.tar"]
    manifest = open_manifest(dataset)
    split = manifest.split("train")
    for shard, name in zip(split.shards, names, strict=True):
        (dataset / name).parent.mkdir(exist_ok=True)
        (dataset / shard.file).rename(dataset / name)
    shards = tuple(replace(shard, file=name) for shard, name in zip(split.shards, names, strict=True))
    write_manifest(replace(manifest, splits={"train": replace(split, shards=shards)}))
    expected = everything(open_manifest(dataset).split("train"))
    for path in (serve(dataset).url, str(dataset), f"file://{dataset}"):
        cache = tmp_path / hashlib.sha256(path.encode()).hexdigest()
        assert everything(open_dataset(config(path, cache)).split("train")) == expected


@pytest.mark.parametrize(
    "url",
    [
        "https://user:SECRET@host/dataset",
        "https://SECRET@host/dataset",
        "ftp://user:1SECRET@host/dataset",
        "s3://key:SECRET@bucket/dataset",
        "https://bucket.s3.amazonaws.com/dataset?X-Amz-Signature=SECRET",
        "https://host/dataset?SECRET",
        "https://host/dataset#SECRET",
        "abfs://box@account.dfs.core.windows.net/dataset?sig=SECRET",
        "simplecache::https://user:SECRET@host/dataset",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(tiny_config, tmp_path, url):
    output = tmp_path / "run"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(tiny_config), "--output", str(output)]
    command += [f"data.path={url}", f"data.cache_dir={tmp_path / 'cache'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 78, result.stderr
    assert result.stderr.startswith("error: ") and "has a password, a token or a query in it" in result.stderr
    assert "SECRET" not in result.stdout + result.stderr and not output.exists()


@pytest.mark.parametrize(
    "url", ["https://host:8080/a@b", "sftp://user@host/dataset", "s3://bucket/a b", "abfs://box@account.net/x", "file:///a#b", "memory://x"]
)
def test_addresses_without_a_secret(url):
    assert DataConfig(path=url, cache_dir="/cache").path == url


def test_what_a_server_sends_us_on_to_is_not_repeated(tmp_path, serve, monkeypatch):
    """As stores of large files do: to a signed address."""
    monkeypatch.setattr(faults, "PAUSES", ())

    class Elsewhere(Handler):
        def do_GET(self) -> None:
            if "Signature" in self.path:
                self.send_error(500)
            else:
                self.send_response(302)
                self.send_header("Location", f"http://user:SECRET@127.0.0.1:{self.server.server_port}/x?X-Amz-Signature=SECRET&y=1")
                self.end_headers()

    with pytest.raises(StorageError, match=r"manifest\.json cannot be read after 1 attempts: .*500") as caught:
        open_dataset(config(serve(tmp_path, Elsewhere).url, tmp_path / "cache"))
    assert "SECRET" not in str(caught.value)


def test_a_server_that_never_ends(dataset, tmp_path, serve, monkeypatch):
    monkeypatch.setattr(faults, "PAUSES", ())

    class Endless(Handler):
        def copyfile(self, source, output) -> None:
            output.write(source.read())
            while self.path.endswith(".tar"):
                output.write(bytes(100_000))

        def send_header(self, name: str, value: str) -> None:
            if name != "Content-Length" or not self.path.endswith(".tar"):
                super().send_header(name, value)

    split = open_dataset(config(serve(dataset, Endless).url, tmp_path / "cache")).split("train")
    with pytest.raises(
        StorageError, match=r"train-00000\.tar cannot be read after 1 attempts: it has more bytes than the \d+ of the manifest"
    ):
        read_one(split)
    assert staged(tmp_path / "cache") == {"train.index"}


def test_a_manifest_that_is_no_file(tmp_path):
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        open_manifest(tmp_path)


def test_credentials_that_fsspec_has(dataset, tmp_path, serve):
    """The remedy: a file in ~/.config/fsspec."""

    class Guarded(Handler):
        def do_GET(self) -> None:
            if self.headers["Authorization"] != "Bearer SECRET":
                return self.send_error(403)
            super().do_GET()

    url = serve(dataset, Guarded).url
    with pytest.raises(DataError, match=r"manifest\.json cannot be read: 403.* See that you may read it"):
        open_dataset(config(url, tmp_path / "cache"))
    (tmp_path / ".config" / "fsspec").mkdir(parents=True)
    (tmp_path / ".config" / "fsspec" / "web.json").write_text('{"http": {"headers": {"Authorization": "Bearer SECRET"}}}')
    code = f"from data_pipeline.storage import *; open_dataset(DataConfig(path={url!r}, cache_dir={str(tmp_path / 'cache')!r}))"
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=60)
    assert "train.index" in staged(tmp_path / "cache")


def test_a_checkpoint_of_before_is_read_without_its_secret(tmp_path):
    from train.checkpoint import VERSION, CheckpointInfo, read_info

    unused = dict.fromkeys(field.name for field in fields(CheckpointInfo))
    document = {**unused, "version": VERSION, "config": {"data": {"path": "s3://key:SECRET@bucket/dataset"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    assert read_info(tmp_path).config["data"]["path"] == "s3://bucket/dataset"


def test_the_home_folder(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = DataConfig(path="~/dataset", cache_dir="~/cache")
    assert (data.path, data.cache_dir) == (str(dataset), str(tmp_path / "cache"))
    everything(open_dataset(data).split("train"))
    assert DataConfig(path="file://~/x", cache_dir="/c").path == "file://~/x"


def test_without_secrets():
    text = "403, url='https://u:p@host:80/a/b?sig=x&y=z#f' and s3://k@b/c"
    assert without_secrets(text) == "403, url='https://host:80/a/b' and s3://b/c"
