"""Addresses of datasets: unusual names, misbehaving servers, and secrets that must not be printed."""

import hashlib
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import faults
from data_pipeline.config import DataConfig, without_secrets
from data_pipeline.faults import StorageError
from data_pipeline.manifest import open_manifest, write_manifest
from data_pipeline.split import DataError
from data_pipeline.storage import open_dataset
from tests.data_pipeline.staging import Handler, Server, config, read_one, staged
from tests.hostile.datasets import everything
from tests.runs import ROOT


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


def test_file_names_with_special_characters_of_urls(dataset, tmp_path, serve):
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
def test_a_secret_in_an_address_is_refused_and_not_printed(tiny_config, tmp_path, url):
    output = tmp_path / "run"
    command = [sys.executable, str(ROOT / "launch/train.py"), "--config", str(tiny_config), "--output", str(output)]
    command += [f"data.path={url}", f"data.cache_dir={tmp_path / 'cache'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 78, result.stderr
    assert result.stderr.startswith("error: ") and "has a password, a token or a query in it" in result.stderr
    assert "SECRET" not in result.stdout + result.stderr and not output.exists()


@pytest.mark.parametrize(
    "url",
    [
        "https://host:8080/a@b",
        "sftp://user@host/dataset",
        "s3://bucket/a b",
        "abfs://box@account.net/x",
        "file:///a#b",
        "memory://x",
    ],
)
def test_addresses_without_a_secret(url):
    assert DataConfig(path=url, cache_dir="/cache").path == url


def test_the_target_of_a_redirect_is_not_printed(tmp_path, serve, monkeypatch):
    """Stores of large files redirect to signed addresses."""
    monkeypatch.setattr(faults, "PAUSES", ())

    class Elsewhere(Handler):
        def do_GET(self) -> None:
            if "Signature" in self.path:
                self.send_error(500)
            else:
                self.send_response(302)
                host = f"127.0.0.1:{self.server.server_port}"
                self.send_header("Location", f"http://user:SECRET@{host}/x?X-Amz-Signature=SECRET&y=1")
                self.end_headers()

    with pytest.raises(StorageError, match=r"manifest\.json cannot be read after 1 attempts: .*500") as caught:
        open_dataset(config(serve(tmp_path, Elsewhere).url, tmp_path / "cache"))
    assert "SECRET" not in str(caught.value)


def test_an_endless_download_is_aborted(dataset, tmp_path, serve, monkeypatch):
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
    sentence = r"train-00000\.tar cannot be read after 1 attempts: it has more bytes than the \d+ of the manifest"
    with pytest.raises(StorageError, match=sentence):
        read_one(split)
    assert staged(tmp_path / "cache") == {"train.index"}


def test_a_manifest_that_is_a_device_is_refused(tmp_path):
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        open_manifest(tmp_path)


def test_fsspec_takes_credentials_from_its_own_file(dataset, tmp_path, serve):
    """The remedy that the documentation gives: a file in ~/.config/fsspec."""

    class Guarded(Handler):
        def do_GET(self) -> None:
            if self.headers["Authorization"] != "Bearer SECRET":
                return self.send_error(403)
            super().do_GET()

    url = serve(dataset, Guarded).url
    with pytest.raises(DataError, match=r"manifest\.json cannot be read: 403.* Check its permissions"):
        open_dataset(config(url, tmp_path / "cache"))
    (tmp_path / ".config" / "fsspec").mkdir(parents=True)
    settings = '{"http": {"headers": {"Authorization": "Bearer SECRET"}}}'
    (tmp_path / ".config" / "fsspec" / "web.json").write_text(settings)
    cache = str(tmp_path / "cache")
    code = f"from data_pipeline.storage import *; open_dataset(DataConfig(path={url!r}, cache_dir={cache!r}))"
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=60)
    assert "train.index" in staged(tmp_path / "cache")


def test_the_secret_in_an_old_checkpoint_is_not_read(tmp_path):
    from train.checkpoint.info import CheckpointInfo, read_info, write_manifest

    config = {"data": {"path": "s3://key:SECRET@bucket/dataset"}}
    write_manifest(tmp_path, CheckpointInfo(0, None, "", [], config, 0, {}, {}, {}, world_size=1))
    assert read_info(tmp_path).config["data"]["path"] == "s3://bucket/dataset"


def test_a_tilde_is_the_home_folder(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = DataConfig(path="~/dataset", cache_dir="~/cache")
    assert (data.path, data.cache_dir) == (str(dataset), str(tmp_path / "cache"))
    everything(open_dataset(data).split("train"))
    assert DataConfig(path="file://~/x", cache_dir="/c").path == "file://~/x"


def test_without_secrets():
    text = "403, url='https://u:p@host:80/a/b?sig=x&y=z#f' and s3://k@b/c"
    assert without_secrets(text) == "403, url='https://host:80/a/b' and s3://b/c"
