"""Read tars of images from untrusted sources in place, without ever unpacking their members into files."""

import bz2
import gzip
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from data_pipeline.split import DataError, UsageError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"),
    *(".jp2", ".heic", ".heif"),  # HEIC cannot be decoded here: such images are left out and named, not ignored
)
MAX_HEADER = 1 << 16  # bytes of one extended header in a tar: a long name, a pax record
PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *PAX)
# A compressed tar may grow to this many bytes, or to this many times its size, whichever is more. Images hardly
# compress, and decompression bombs grow by a factor of a thousand.
ALWAYS_ALLOWED = 4 << 30
MOST_GROWTH = 200


def check_name(what: str | Path, name: str) -> None:
    """Raise DataError for a name with control characters, which could affect a terminal or a log."""
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise DataError(f"{what} has a file whose name has control characters: {name!r}. Rename it.")


class _Header(tarfile.TarInfo):
    """A tar header with limits, because tarfile reads a header's data into memory and converts long numbers slowly."""

    def _proc_member(self, tar):
        if self.size < 0 or (self.type in EXTENDED and self.size > MAX_HEADER):
            raise ValueError(f"the header at byte {self.offset} gives a size of {self.size} bytes")
        if self.type in PAX:
            place = tar.fileobj.tell()
            if re.search(rb"\d{99}", tar.fileobj.read(self.size)):
                raise ValueError(f"the header at byte {self.offset} has a number of 99 digits or more")
            tar.fileobj.seek(place)
        return super()._proc_member(tar)


def tar_files(what: str | Path, file: BinaryIO, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset in `file`, size) of every regular file of the tar in the bytes start … end of `file`.

    Folders are among them; their names end in a slash, and their size is 0.

    Raises DataError if the tar is damaged, if members overlap, or if an image is not a regular file (a link, a device,
    a sparse file).
    """
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            previous_end = start
            while (member := tar.next()) is not None:
                tar.members.clear()  # otherwise tarfile keeps every member: gigabytes for a million images
                if member.offset_data + member.size > end or tar.offset > end:
                    raise DataError(f"{what} is cut off: {member.name!r} does not end inside it.")
                fits = not member.isreg() or 0 <= member.size <= tar.offset - member.offset_data
                if tar.offset <= previous_end or not fits:
                    raise DataError(
                        f"{what} is damaged: "
                        f"{member.name!r} has a size of {member.size} bytes and overlaps other members."
                    )
                previous_end = tar.offset
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                name, is_image = "/".join(parts), member.name.lower().endswith(IMAGE_SUFFIXES)
                if is_image and ".." in parts:
                    raise DataError(f"{what} has an image with a path outside itself: {member.name!r}.")
                if any(part.startswith(".") or part == "__MACOSX" for part in parts):
                    continue
                if is_image and (member.islnk() or member.issym()):
                    raise DataError(
                        f"{name!r} in {what} is a link: pack the files themselves (tar --dereference "
                        "--hard-dereference)."
                    )
                if is_image and (member.issparse() or not (member.isreg() or member.isdir())):
                    raise DataError(
                        f"{name!r} in {what} is not a plain file: pack it without --sparse, and no devices."
                    )
                if member.isreg():
                    if is_image:
                        check_name(what, name)
                    yield name, member.offset_data, member.size
                elif member.isdir() and name:
                    yield f"{name}/", member.offset_data, 0
            # tarfile also stops at a damaged header and at the end of the file. The real end is a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE) or file.tell() > end:
                raise DataError(
                    f"{what} is damaged or cut off: after byte {tar.offset - start} is neither a member nor the "
                    "archive's end."
                )
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise DataError(f"{what} is not a whole tar archive ({error}).") from error


def plain_tar(path: Path, work: Path) -> Path:
    """The tar itself or, if it is compressed, a plain copy in `work`: only a plain tar allows random access."""
    with open(path, "rb") as file:
        magic = file.read(6)
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open, b"\x28\xb5\x2f\xfd": _open_zstd}
    opener = next((opener for start, opener in openers.items() if magic.startswith(start)), None)
    if opener is None:
        return path
    # Named after size and modification time, so that the copy of an earlier state of the file is not used.
    stat = path.stat()
    plain = work / f"source-{stat.st_size}-{stat.st_mtime_ns}.tar"
    if not plain.exists():
        temporary = work / "source.tmp"
        try:
            _decompress(path, opener, temporary, max(ALWAYS_ALLOWED, MOST_GROWTH * stat.st_size))
        except BaseException:
            temporary.unlink(missing_ok=True)  # it may be what fills the disk
            raise
        os.replace(temporary, plain)
    return plain


def _decompress(path: Path, opener: Callable, temporary: Path, most: int) -> None:
    """Decompress `path`, to at most `most` bytes, into `temporary`.

    Raises DataError, or OSError for errors of the disk.
    """
    try:
        with opener(path, "rb") as compressed, open(temporary, "wb") as file:
            while chunk := compressed.read(1 << 20):
                if file.tell() + len(chunk) > most:
                    size = path.stat().st_size
                    raise DataError(
                        f"{path} grows from {size} to more than {most} bytes: if that is right, decompress it yourself."
                    )
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, subprocess.CalledProcessError) as error:
        raise DataError(f"{path} cannot be decompressed: {error}.") from error
    except OSError as error:
        if error.errno is not None:  # the disk's error, not the compressed stream's
            raise
        raise DataError(f"{path} cannot be decompressed: {error}.") from error


class _open_zstd:
    """Reads a .zst file with the `zstd` program, because Python reads the format only from 3.14 on."""

    def __init__(self, path: Path, mode: str):
        if shutil.which("zstd") is None:
            raise UsageError(
                f"{path} is compressed with zstd, and there is no zstd program here: "
                "install it, or decompress the file."
            )
        self.process = subprocess.Popen(["zstd", "-dcq", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def __enter__(self) -> IO[bytes]:
        return self.process.stdout

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.process.kill()
        self.process.stdout.close()
        if self.process.wait() and kind is None:
            raise subprocess.CalledProcessError(self.process.returncode, "zstd")
