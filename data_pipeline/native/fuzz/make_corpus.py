"""Write corpus/: a tiny JPEG of every kind, each followed by 16 bytes of parameters for fuzz.c.

Needs Debian's libjpeg-turbo-progs.
"""

import io
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

CORPUS = Path(__file__).parent / "corpus"
SCANS = "0; 1; 2;"  # three scans of one component each

# Arguments of cjpeg.
KINDS = {
    "444": "-sample 1x1",
    "422": "-sample 2x1",
    "420": "-sample 2x2",
    "440": "-sample 1x2",
    "411": "-sample 4x1",
    "odd_sampling": "-sample 2x1,1x2,1x1",
    "mixed_sampling": "-sample 2x2,2x1,1x2",
    "gray": "-grayscale",
    "rgb": "-rgb",
    "optimized": "-optimize -quality 90",
    "quality_100": "-quality 100",
    "quality_5": "-quality 5",
    "restarts_rows": "-restart 1",
    "restarts_blocks": "-restart 3B -sample 2x1",
    "progressive": "-progressive",
    "progressive_444": "-progressive -sample 1x1 -restart 2B",
    "scans": "-scans SCANS",
    "arithmetic": "-arithmetic",
    "arithmetic_progressive": "-arithmetic -progressive",
}
UNUSUAL = {
    "441": "-sample 1x4",
    "410": "-sample 4x2",
    "3x1": "-sample 3x1",
    "1x3_progressive": "-sample 1x3 -progressive",
    "2x4_restarts": "-sample 2x4 -restart 1",
    "chroma_larger": "-sample 1x1,2x2,1x2",
    "gray_4x4": "-grayscale -sample 4x4",
}


def picture(width: int, height: int, seed: int) -> np.ndarray:
    """A smooth image with an edge and noise, so that long and short codes, zeros and runs all occur."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([128 + 100 * np.sin((x * a + y * b) / 9) for a, b in random.uniform(0.2, 1.5, (3, 2))], -1)
    image[:, width // 2 :] = 255 - image[:, width // 2 :]
    image[height // 2 :] += random.normal(0, 30, image[height // 2 :].shape)
    return image.clip(0, 255).astype(np.uint8)


def cjpeg(image: np.ndarray, arguments: str) -> bytes:
    scans = Path("/tmp/scans.txt")
    scans.write_text(SCANS)
    ppm = b"P6 %d %d 255\n" % image.shape[1::-1] + image.tobytes()
    return subprocess.run(
        ["cjpeg", *arguments.replace("SCANS", str(scans)).split()], input=ppm, stdout=subprocess.PIPE, check=True
    ).stdout


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (2 + len(body)).to_bytes(2, "big") + body


def many_scans(count: int) -> bytes:
    """A gray progressive image of 24x16 pixels in `count` scans (64 to 883) of single coefficient bits, a byte each."""
    steps = [
        (count - 1) // 63 + (k <= (count - 1) % 63) for k in range(1, 64)
    ]  # of each coefficient: one scan for each of its bits
    scans = [(0, 0, 0, 0)]
    scans += [
        (k, k, bit + 1 if bit + 1 < steps[k - 1] else 0, bit)
        for k in range(1, 64)
        for bit in reversed(range(steps[k - 1]))
    ]
    table = bytes([1, *bytes(15), 0])  # one code of one bit: a difference of 0, or no coefficients
    parts = [
        b"\xff\xd8",
        segment(0xDB, b"\0" + bytes([8] * 64)),
        segment(0xC2, bytes([8, 0, 16, 0, 24, 1, 1, 0x11, 0])),
    ]
    parts += [segment(0xC4, b"\0" + table), segment(0xC4, b"\x10" + table)]
    for first, last, high, low in scans:
        parts += [
            segment(0xDA, bytes([1, 1, 0, first, last, high << 4 | low])),
            b"\x03",
        ]  # six blocks: six codes 0 and two fill bits
    return b"".join([*parts, b"\xff\xd9"])


def without_scans(data: bytes, keep: int) -> bytes:
    """An image with its first `keep` scans only."""
    places = [place for place in range(len(data)) if data.startswith(b"\xff\xda", place)]
    tables = data.find(b"\xff\xc4", places[keep - 1], places[keep])  # of the next scan, if it has any
    return data[: places[keep] if tables < 0 else tables] + b"\xff\xd9"


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    images = {name: cjpeg(picture(49, 43, 1), arguments) for name, arguments in KINDS.items()}
    images["one_pixel"] = cjpeg(picture(1, 1, 2), "-sample 2x2")
    images["narrow"] = cjpeg(picture(3, 90, 3), "-sample 2x2")
    images["wide"] = cjpeg(picture(700, 3, 4), "-sample 2x2 -quality 30")
    buffer = io.BytesIO()
    Image.fromarray(picture(24, 24, 5)).convert("CMYK").save(buffer, "JPEG")
    images["cmyk"] = buffer.getvalue()
    plain = images["420"]
    frame = plain.index(b"\xff\xc0")
    images["12_bit"] = plain[: frame + 4] + b"\x0c" + plain[frame + 5 :]
    images["lossless"] = plain.replace(b"\xff\xc0", b"\xff\xc3", 1)
    images["truncated"] = plain[: len(plain) * 2 // 3]
    images["zero_tail"] = plain[: len(plain) * 2 // 3] + bytes(len(plain) // 3)
    images["progressive_incomplete"] = without_scans(images["progressive"], 2)
    images["garbage"] = b"no JPEG at all, but long enough to be one"
    images |= {name: cjpeg(picture(49, 43, 1), arguments) for name, arguments in UNUSUAL.items()}
    images["progressive_without_last"] = without_scans(images["progressive"], 9)
    images["progressive_444_incomplete"] = without_scans(images["progressive_444"], 5)
    images["scans_without_last"] = without_scans(images["scans"], 2)
    images["scans_500"], images["scans_501"] = many_scans(500), many_scans(501)
    random = np.random.default_rng(0)
    for name, data in images.items():
        x, y = random.integers(-6, 20, 2)
        width, height = random.integers(8, 60, 2)
        size, choice = random.integers(1, 48), random.choice([1, 3, 34, 35, 7, 38])
        first = np.array([x, y, width, height], "<i2").tobytes()
        parameters = first + bytes([size, choice, *random.integers(0, 32, 4).tolist(), 1, 48])
        (CORPUS / f"{name}.jpg").write_bytes(data + parameters)


if __name__ == "__main__":
    main()
