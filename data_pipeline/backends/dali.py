"""Backend that decodes, crops, resizes and mirrors with NVIDIA DALI.

The project chooses the samples and windows, and reads the bytes through the manifest's index. Pixels differ from those
of the project's decoder by 0.2 of 255 on average, because DALI's cubic filter is not Pillow's. If `out` is a CUDA
tensor, the same pipeline decodes with nvJPEG ("mixed"); this path has not been run on a GPU yet.
"""

import importlib.util
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..jpeg import MOST_SCANS, has_too_many_scans, read_header
from ..split import DataError, Split, UsageError
from .stored import StoredSamples, stored_in_beton, stored_in_shards

if TYPE_CHECKING:  # both take seconds to import
    import torch
    from nvidia.dali.pipeline import Pipeline

BATCH = 64  # images that a pipeline is built for; a larger batch gets a larger pipeline


class DALIBackend:
    """Decodes samples of `split` by id.

    Thread-safe: each calling thread has its own pipelines, of one DALI thread each.
    Reads the WebDataset shards, or the FFCV file if there are none. Raises UsageError if DALI is not installed,
    DataError if the split has no JPEGs.
    """

    def __init__(self, split: Split):
        if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
            raise UsageError(
                "data.backend=dali needs nvidia-dali: pip install -e '.[dali]', or train with data.backend=webdataset."
            )
        self.stored = _stored_jpegs(split)
        self._local = threading.local()

    def decode_batch(
        self,
        ids: np.ndarray,
        windows: np.ndarray,
        shape: tuple[int, int],
        interpolation: str,
        out: "np.ndarray | torch.Tensor",
    ) -> dict[int, str]:
        """See Backend. `out` may also be a CUDA tensor (torch.uint8); nvJPEG then decodes straight into GPU memory."""
        encoded, failures = self.stored.read(ids)
        dimensions = self.stored.dimensions(ids).astype(np.int32)
        for row, data in enumerate(encoded):
            if row not in failures and (reason := _unfit(data, *dimensions[row].tolist())):
                failures[row] = reason
        x, y, width, height = windows[:, :4].T
        padded = (x < 0) | (y < 0) | (x + width > dimensions[:, 0]) | (y + height > dimensions[:, 1])
        # Padded windows are decoded separately, so that a sample's pixels depend on its own window alone.
        for kind in (False, True):
            rows = [row for row in np.flatnonzero(padded == kind).tolist() if row not in failures]
            if rows:
                failures |= self._decode(rows, encoded, windows, (shape, interpolation, kind), out)
        return self.stored.sentences(ids, failures)

    def _decode(
        self, rows: list[int], encoded: Sequence[bytes], windows: np.ndarray, kind: tuple, out
    ) -> dict[int, str]:
        """Run the rows through one pipeline and copy the pixels into `out`.

        Returns {row: reason} of undecodable rows.
        """
        chosen = windows[rows]
        inputs = {
            "jpeg": [np.frombuffer(encoded[row], np.uint8) for row in rows],
            "anchor": np.ascontiguousarray(chosen[:, [1, 0]]),
            "extent": np.ascontiguousarray(chosen[:, [3, 2]]),
            "flip": np.ascontiguousarray(chosen[:, 4]),
        }
        gpu = None if isinstance(out, np.ndarray) else out.device.index
        pipelines = self._local.__dict__.setdefault("pipelines", {})
        key = (gpu, *kind)
        if key not in pipelines or pipelines[key].max_batch_size < len(rows):
            pipelines[key] = build_pipeline(max(BATCH, len(rows)), gpu, *kind)
        try:
            (pixels,) = pipelines[key].run(**inputs)
        except RuntimeError as error:
            del pipelines[key]  # a pipeline that has failed once cannot run again
            if "fn.decoders" not in str(error):
                raise  # not the fault of a sample
            if len(rows) == 1:
                return {rows[0]: "DALI cannot decode it"}
            # At least one row is bad. Decode each alone to find out which, and to decode the others.
            return {row: why for one in rows for row, why in self._decode([one], encoded, windows, kind, out).items()}
        _copy(pixels.as_tensor(), rows, out)
        return {}


def build_pipeline(batch: int, gpu: int | None, shape: tuple[int, int], interpolation: str, padded: bool) -> "Pipeline":
    """Build a DALI pipeline from `jpeg` (bytes), `anchor` (y, x), `extent` (height, width) and `flip` to pixels.

    Its output is uint8 [batch, *shape, 3]. gpu: None decodes on the CPU, a number on that GPU. padded: windows may
    extend beyond the image; pixels outside the image are black.
    """
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    window = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
    # Fancy upsampling makes nvJPEG interpolate the chroma as libjpeg does.
    decoder = {"device": "cpu" if gpu is None else "mixed", "adjust_orientation": False, "jpeg_fancy_upsampling": True}
    pipeline = Pipeline(batch_size=batch, num_threads=1, device_id=gpu, prefetch_queue_depth=1)
    with pipeline:
        jpeg = fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1)
        anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
        extent = fn.external_source(name="extent", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        if padded:
            image = fn.slice(
                fn.decoders.image(jpeg, **decoder), anchor, extent, out_of_bounds_policy="pad", fill_values=0, **window
            )
        else:
            image = fn.decoders.image_slice(jpeg, anchor, extent, **window, **decoder)
        filter = types.INTERP_CUBIC if interpolation == "bicubic" else types.INTERP_LINEAR
        image = fn.resize(image, size=shape, interp_type=filter, antialias=True)
        pipeline.set_outputs(fn.flip(image, horizontal=flip))
    return pipeline


def _copy(pixels, rows: list[int], out) -> None:
    """Copy DALI's tensor into the rows of `out`, both on the host or both on a GPU.

    The copy is complete on return, because DALI then reuses the tensor's memory.
    """
    import torch

    out = torch.from_numpy(out) if isinstance(out, np.ndarray) else out
    out.index_copy_(0, torch.tensor(rows, device=out.device), torch.from_dlpack(pixels))
    if out.is_cuda:
        torch.cuda.current_stream(out.device).synchronize()


def _stored_jpegs(split: Split) -> StoredSamples:
    if not split.shards and split.beton and split.beton.mode == "raw":
        raise DataError(
            f"{split.folder} has only raw pixels of split {split.name!r}, and DALI decodes JPEGs: "
            "train with data.backend=ffcv."
        )
    return stored_in_beton(split) if split.beton and not split.shards else stored_in_shards(split)


def _unfit(data: bytes, width: int, height: int) -> str | None:
    """The reason why the other backends would refuse an image, or None.

    DALI itself decodes PNG and CMYK, and fills the missing part of a truncated image with gray.
    """
    if has_too_many_scans(data):
        return f"it has more than {MOST_SCANS} scans"
    try:
        found_width, found_height, colorspace = read_header(data)
    except ValueError as error:
        return str(error)
    if colorspace in ("CMYK", "YCCK"):
        return f"it is a {colorspace} JPEG"
    end = data.rfind(b"\xff\xd9")
    if end < 0 or data.find(b"\xff\xda", end) > 0:  # a scan begins after the last end marker, which a thumbnail had
        return "it has no end"
    if (found_width, found_height) != (width, height):
        return f"it is {found_width}x{found_height} pixels where the index says {width}x{height}"
    return None
