"""One run per folder, on any node. Standard library only: a folder in use is answered before torch is imported."""

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

from train.config import ConfigError
from train.telemetry.formatting import clock

BEAT = 3.0  # seconds between two signs of life
FIRST_BEAT = 1.0  # seconds to the first one, which also finds out whether two runs took the folder at once
WATCH = 3 * BEAT + 1  # seconds in which a run that lives has rewritten its record, on a disk that stalls, too
SIZE = 512  # bytes of a record: always one write of the same place
# ENOSYS is Lustre's answer where it is mounted without flock.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class FolderInUse(ConfigError):
    """Another run lives in the folder. Rank 0 alone looks, for all nodes."""

    everywhere = True


class RunLock:
    """`output/.lock`: a flock, which the kernel releases when the process dies, and a record, rewritten as long as the process lives.

    The flock decides on one machine, and wherever it reaches the other nodes; the record decides where it does not. Nobody's clock is
    compared with another's: a record counts as alive if it is seen to change.

    `previous`: the record found by `acquire`, {host, boot, pid, token, started, beat, ended}, or None in a new folder. `beat` is the
    Unix time of the last sign of life of the previous start; `ended`: it ended cleanly.
    """

    def __init__(self, output: Path):
        self.previous: dict | None = None
        self._path = output / ".lock"
        self._file: int | None = None
        self._record = {
            "host": socket.gethostname(),
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),  # tells machines apart, also those of one name
            "pid": os.getpid(),
            "token": secrets.token_hex(8),
            "started": time.time(),
        }
        self._stop, self._has_beaten = threading.Event(), threading.Event()
        self._lost = False  # another run has written its record over this one's
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the folder. At once, but after another machine's run that did not end cleanly, which is watched for WATCH seconds.

        Raises FolderInUse where a run lives in the folder, ConfigError where it cannot be written.
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
            raise ConfigError(f"{self._path} cannot be written ({error.strerror}); choose another --output") from error
        os.register_at_fork(after_in_child=self._let_go)
        self._thread.start()

    def check(self) -> None:
        """Raises FolderInUse where another machine's run, which flock does not stop, took the folder nevertheless: of two, one goes on.

        That is where both started at the same moment, or this one was suspended. Call it before the first step, where it may wait until
        FIRST_BEAT seconds after `acquire`, and before whatever must not be done twice.
        """
        self._has_beaten.wait()
        if self._lost:
            self._refuse()

    def release(self) -> None:
        """The run has ended, for whatever reason it has time to say so."""
        self._stop.set()
        self._thread.join()
        if not self._lost:
            try:
                self._write(ended=True)
            except OSError:
                pass  # the next start finds a record that does not change
        self._let_go()

    def _flock(self) -> bool:
        """Whether the file system has locks at all."""
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
                pass  # a full or broken disk is no reason to end: it may come back
            finally:
                self._has_beaten.set()

    # Opened anew each time: that is when a network file system promises to show what others have written.
    def _read(self) -> bytes:
        with open(self._path, "rb") as file:
            return file.read(SIZE)

    def _write(self, *, ended: bool) -> None:
        record = json.dumps({**self._record, "beat": time.time(), "ended": ended}).encode()
        file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(file, record.ljust(SIZE - 1) + b"\n", 0)
        finally:
            os.close(file)

    def _refuse(self) -> NoReturn:
        who, holder = "another run", _parse(self._read())
        if holder:
            who = f"a run on host {holder['host']}, process {holder['pid']}, since {clock(holder['started'])}"
        self._let_go()
        raise FolderInUse(f"{self._path.parent} is in use by {who}; wait for it, stop it, or choose another --output")

    def _let_go(self) -> None:
        """Also in a forked child: the lock is the parent's, and must not live as long as the child."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _parse(content: bytes) -> dict | None:
    """The record, or None where there is none or it is being written."""
    try:
        return json.loads(content)
    except ValueError:
        return None
