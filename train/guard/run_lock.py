"""A lock that allows one run per folder, on any node.

Does not import torch, so that a folder in use is reported at once.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import NoReturn

from data_pipeline.faults import LASTING, StorageError
from train.config import ConfigError
from train.telemetry.formatting import clock

BEAT = 3.0  # seconds between two updates of the record
FIRST_BEAT = 1.0  # seconds until the first one, which also detects that two runs took the folder at once
WATCH = 3 * BEAT + 1  # seconds within which a live run updates its record, even if the disk stalls for a while
SIZE = 512  # bytes of a record, written at once at offset 0
# Lustre returns ENOSYS if it is mounted without flock.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class FolderInUse(ConfigError):
    """The folder is in use by another run. Only rank 0 checks, and its answer holds for all nodes."""

    everywhere = True


class RunLock:
    """The file `output/.lock`: locked by flock, with a record that its owner rewrites every BEAT seconds.

    The flock, which the kernel releases when the process dies, decides between processes of one machine, and between
    nodes if the file system supports that. If it does not, the record decides: a run is alive if its record is seen to
    change. Clocks of different machines are never compared.

    previous: the record found by `acquire`, {host, boot, pid, token, started, beat, ended}; None in a new folder.
    `started` and `beat` are the Unix times of the previous start's beginning and last update; `ended` is whether it
    ended cleanly.
    """

    def __init__(self, output: Path):
        self.previous: dict | None = None
        self._path = output / ".lock"
        self._file: int | None = None
        self._record = {
            "host": socket.gethostname(),
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),  # unique per machine, unlike its name
            "pid": os.getpid(),
            "token": secrets.token_hex(8),
            "started": time.time(),
        }
        self._stop, self._has_beaten = threading.Event(), threading.Event()
        self._lost = False  # whether another run has overwritten the record
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock. Raises FolderInUse if a live run has it, ConfigError or StorageError if the file cannot be
        written.

        Returns at once, except if a run on another machine did not end cleanly: its record is watched for WATCH
        seconds.
        """
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            found = self._read()
            self.previous = _parse(found)
            decided = self._flock() and (self.previous or {}).get("boot") == self._record["boot"]
            ended = self.previous is not None and self.previous["ended"]
            if found and not decided and not ended and self._changes(found):
                self._refuse()
            self._write(ended=False)
        except OSError as error:
            self._let_go()  # this process may try again
            raise cannot_write(self._path, error) from error
        os.register_at_fork(after_in_child=self._let_go)
        self._thread.start()

    def check(self) -> None:
        """Raise FolderInUse if a run on another machine, which flock may not exclude, has taken the folder meanwhile.

        That happens if both started at the same moment, or if this process was suspended; only one of the two
        continues. Call it before the first step, where it may wait until FIRST_BEAT seconds after `acquire`, and before
        anything that two runs must not both do.
        """
        self._has_beaten.wait()
        if self._lost:
            self._refuse()

    def release(self) -> None:
        """Mark the record as ended, and release the lock."""
        self._stop.set()
        self._thread.join()
        if not self._lost:
            try:
                self._write(ended=True)
            except OSError:
                pass  # the next start will see that the record does not change
        self._let_go()

    def _flock(self) -> bool:
        """Take the flock; returns False if the file system does not support it. Raises FolderInUse if it is taken."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse()
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return False
        return True

    def _changes(self, found: bytes) -> bool:
        """Whether the record changes within WATCH seconds."""
        deadline = time.monotonic() + WATCH
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if self._read() != found:
                return True
        return False

    def _keep_beating(self) -> None:
        pause = FIRST_BEAT
        while not self._stop.wait(pause):
            pause = BEAT
            try:
                now = _parse(self._read())
                if now and now["token"] != self._record["token"]:
                    self._lost = True
                    return
                self._write(ended=False)
            except OSError:
                pass  # a full or failing disk may recover
            finally:
                self._has_beaten.set()

    # Open the file each time: network file systems guarantee to show other nodes' writes only after an open.
    def _read(self) -> bytes:
        with open(self._path, "rb") as file:
            return file.read(SIZE)

    def _write(self, *, ended: bool) -> None:
        record = json.dumps({**self._record, "beat": time.time(), "ended": ended}).encode()
        with open(self._path, "r+b", buffering=0) as file:
            file.write(record.ljust(SIZE - 1) + b"\n")

    def _refuse(self) -> NoReturn:
        who, holder = "another run", _parse(self._read())
        if holder:
            who = f"a run on host {holder['host']}, process {holder['pid']}, since {clock(holder['started'])}"
        self._let_go()
        raise FolderInUse(f"{self._path.parent} is in use by {who}; wait for it, stop it, or choose another --output")

    def _let_go(self) -> None:
        """Close the file, also in a forked child, which would otherwise keep the parent's lock alive."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def cannot_write(path: Path, error: OSError) -> ConfigError | StorageError:
    """The error to raise if a run's folder, or its lock, cannot be made: a later start may find a disk with room."""
    if isinstance(error, (*LASTING, FileExistsError)) or error.errno == errno.EROFS:
        return ConfigError(f"{path} cannot be written ({error.strerror}); choose another --output")
    return StorageError(f"{path} cannot be written ({error.strerror}); mend that, and start again")


def _parse(content: bytes) -> dict | None:
    """The record; None if there is none, or if it is being written."""
    try:
        return json.loads(content)
    except ValueError:
        return None
