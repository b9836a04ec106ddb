"""Pack a source of images into a prepared dataset: WebDataset shards, an index per split, the manifest (manifest.py).

Every image has a class, a label map or objects; the latter two have annotations beside the index (split.TABLES). The
shards are planned from the listing of the source before the first one is written, so the plan is a pure function of the
source and the arguments. Worker processes write shards in any order, a killed run continues with the missing ones, and
the result is the same byte by byte. A sample's key in its shard is its position in the plan; its id is its position in
the index. The two differ only after a corrupt image that was left out.

`DEST/.work` (ownership.py) holds `plan.json` (the arguments and a digest of the listing), and `<shard>.done` for each
finished shard (pack.py).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.durable import write_atomically
from data_pipeline.formatting import counted
from data_pipeline.manifest import FILE_NAME, Manifest, open_manifest, write_manifest
from data_pipeline.preparation.finish import REPORT_NAME, files_beside, finish
from data_pipeline.preparation.image_source import SPLITS, Items, Listing
from data_pipeline.preparation.label_map_listing import LABEL_OPTIONS, NO_LABEL_OPTIONS, LabelOptions
from data_pipeline.preparation.listing import add_val, list_source, open_source, read_image
from data_pipeline.preparation.object_listing import NO_OBJECT_OPTIONS, OBJECT_OPTIONS, ObjectOptions, without_empty
from data_pipeline.preparation.ownership import WORK, claim, remove_work_folder, work_folder
from data_pipeline.preparation.pack import BLOCK, ShardTask, done_path, pack, read_done
from data_pipeline.preparation.progress import Progress
from data_pipeline.preparation.workers import run_tasks
from data_pipeline.split import DETECTION, LABEL_MAP, Split, UsageError
from data_pipeline.validate import AS_IT_IS, BadImage, Encoding, check_image


def prepare(
    source_text: str,
    dest: Path,
    *,
    workers: int,
    shard_bytes: int,
    val_fraction: float,
    seed: int,
    val: str | None = None,
    val_labels: Path | None = None,
    encoding: Encoding = AS_IT_IS,
    label_options: LabelOptions = NO_LABEL_OPTIONS,
    object_options: ObjectOptions = NO_OBJECT_OPTIONS,
    beton_mode: str | None = None,
) -> bool:
    """Prepare `dest`, or continue a killed run with the same arguments. Returns False if it was finished already.

    source_text: the source, as on the command line. val: the source of val, if it is another one. shard_bytes: intended
    size of a shard. val_fraction: share of the images that becomes val if the source has no val (0: none). val_labels:
    see labels.py. label_options: for sources with label maps. object_options: for those with boxes. beton_mode: "jpeg"
    or "raw" also writes an FFCV file per split. Raises UsageError, DataError, OSError (a full disk), or
    BrokenProcessPool if a worker was killed.
    """
    dest, work = dest.resolve(), dest.resolve() / WORK
    arguments = {
        "source": _absolute(source_text),
        "shard_bytes": shard_bytes,
        "val_fraction": val_fraction,
        "seed": seed,
        "val": val and _absolute(val),
        "val_labels": val_labels and _absolute(str(val_labels)),
        "resize_short": encoding.resize_short,
        "max_side": encoding.max_side,
        "quality": encoding.quality,
        **label_options.given(),
        **object_options.given(),
    }
    if beton_mode:
        from data_pipeline.preparation.beton import require_ffcv

        require_ffcv()
    finished = (dest / FILE_NAME).exists()
    if finished:
        _refuse_other(dest, arguments, dest / REPORT_NAME)
        # open_manifest reports files that are missing since, which training would otherwise find later.
        if not _without_beton(open_manifest(dest), beton_mode) and not work.is_dir():
            return False
    elif dest.is_dir() and any(path != work for path in dest.iterdir()) and not (work / "plan.json").exists():
        raise UsageError(f"{dest} is not empty: choose a new folder, or delete it.")
    with work_folder(dest):
        if not finished:
            _refuse_other(dest, arguments, work / "plan.json")
            listing = list_source(open_source(source_text, work), label_options, object_options)
            if val:
                listing = add_val(listing, open_source(val, work), val_labels)
            if listing.category_ids and (encoding.resize_short or encoding.max_side):
                raise UsageError(
                    "--resize-short and --max-side would change the size of the images and not their boxes: leave them "
                    "out; training scales both."
                )
            listing = without_empty(_draw_val(listing, val_fraction, seed), object_options)
            _write_shards(dest, listing, shard_bytes, seed, encoding, arguments, workers)
        changed = _add_betons(dest, beton_mode, workers) or not finished
        remove_work_folder(dest)
    return changed


def _absolute(text: str) -> str:
    return str(Path(text).resolve()) if Path(text).exists() else text


def read_arguments(path: Path) -> dict:
    """The arguments in a dataset's report or plan; {} if the file is missing or was written by another program."""
    try:
        arguments = json.loads(path.read_bytes())["arguments"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _refuse_other(dest: Path, arguments: dict, path: Path) -> None:
    """Raise UsageError if `path` (a plan or a report) shows that `dest` was begun with other arguments."""
    if path.exists():
        earlier = read_arguments(path)
        changed = [
            f"{key} {earlier.get(key)} and not {arguments.get(key)}"
            for key in dict.fromkeys((*arguments, *LABEL_OPTIONS, *OBJECT_OPTIONS))
            if not _is_same(earlier.get(key), arguments.get(key))
        ]
        if changed:
            raise UsageError(f"{dest} was prepared with {', '.join(changed)}: give another folder, or delete it.")


def _is_same(earlier: object, now: object) -> bool:
    """Whether two arguments are equal, or name one path: that of a source is relative again once the source is gone."""
    if isinstance(earlier, str) and isinstance(now, str):
        return earlier == now or earlier == str(Path(now).resolve())
    return earlier == now


# --- the plan --------------------------------------------------------------------------------------------------------


def _draw_val(listing: Listing, fraction: float, seed: int) -> Listing:
    """The listing with `fraction` of its train images moved to val, drawn at random by the seed."""
    if not fraction:
        return listing
    if "val" in listing.splits:
        raise UsageError("the source has a val split of its own: leave --val-fraction out.")
    train = listing.splits["train"]
    count = round(len(train.names) * fraction)
    if not 0 < count < len(train.names):
        raise UsageError(f"--val-fraction {fraction} of {counted(len(train.names), 'image')} leaves a split empty.")
    order = _permutation(len(train.names), seed, stream=len(SPLITS))
    return replace(
        listing, splits={"train": train.take(np.sort(order[count:])), "val": train.take(np.sort(order[:count]))}
    )


def _permutation(n: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of 0 … n-1, a function of the seed and the stream."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))).permutation(n)


@dataclass(frozen=True)
class _Plan:
    """One split, shuffled and cut into shards: shard i has the items order[cuts[i] : cuts[i + 1]]."""

    split: str
    items: Items
    order: np.ndarray
    cuts: list[int]

    def files(self) -> list[str]:
        return [self.file(number) for number in range(len(self.cuts) - 1)]

    def file(self, number: int) -> str:
        return f"{self.split}-{number:06d}.tar"


def _plan_split(split: str, items: Items, shard_bytes: int, scale: float, seed: int) -> _Plan:
    """Cut a split into shards of about equal size.

    scale: estimated size of a stored image relative to the source. If it holds, and images are small relative to
    `shard_bytes`, no shard is larger than `shard_bytes`.
    """
    order = _permutation(len(items.names), seed, SPLITS.index(split))
    # A file takes a header block and its bytes in whole blocks.
    beside = np.ones(1, np.int64)  # the label of a class
    if items.maps:
        beside = items.maps.sizes[order]
    elif items.objects:
        beside = np.array([len(document) for document in items.objects.documents])[order]
    sizes = ((items.sizes[order] * scale).astype(np.int64), beside)
    ends = np.cumsum(sum(BLOCK + -(-bytes // BLOCK) * BLOCK for bytes in sizes))
    count = -(-int(ends[-1]) // shard_bytes)
    shard = np.concatenate([[0], ends[:-1]]) * count // ends[-1]
    return _Plan(split, items, order, [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(order)])


def _size_after_encoding(listing: Listing, encoding: Encoding) -> float:
    """Size of stored images relative to their originals, estimated from up to 64 images spread over the source."""
    if encoding == AS_IT_IS:
        return 1.0
    before = after = 0
    for items in listing.splits.values():
        for i in range(0, len(items.names), -(-len(items.names) // 32)):
            try:
                data = read_image(items.source, items.names[i], int(items.offsets[i]), int(items.sizes[i]))
                after += len(check_image(data, encoding).data)
                before += len(data)
            except BadImage:
                continue
    return after / before if before else 1.0


# --- the execution ---------------------------------------------------------------------------------------------------


def _write_shards(
    dest: Path, listing: Listing, shard_bytes: int, seed: int, encoding: Encoding, arguments: dict, workers: int
) -> None:
    """Plan the shards, write them, and write the manifest."""
    state = {"arguments": arguments, "listing": listing.digest()}
    path = dest / WORK / "plan.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        scale = earlier.pop("scale")
        if earlier != state:
            raise UsageError(
                f"{arguments['source']} has changed since {dest} was begun: delete {dest} and start again."
            )
    else:
        scale = _size_after_encoding(listing, encoding)
        write_atomically(path, json.dumps({**state, "scale": scale}).encode())
    plans = [_plan_split(split, items, shard_bytes, scale, seed) for split, items in listing.splits.items()]
    annotations = DETECTION if listing.category_ids else (LABEL_MAP,) if listing.coding else ()
    beside = files_beside((plan.split for plan in plans), annotations)
    claim(dest, [*beside, *(file for plan in plans for file in plan.files())])
    total = sum(len(plan.order) for plan in plans)
    missing = [(plan, number) for plan in plans for number, file in enumerate(plan.files()) if not _is_done(dest, file)]
    left = sum(plan.cuts[number + 1] - plan.cuts[number] for plan, number in missing)

    def tasks() -> Iterator[ShardTask]:
        for slot, (plan, number) in enumerate(missing):
            first, last = plan.cuts[number], plan.cuts[number + 1]
            items = plan.items.take(plan.order[first:last])
            yield ShardTask(dest, plan.file(number), items, first, slot, encoding, listing.coding)

    if missing:
        with Progress("images", "packing", total, total - left) as progress:
            run_tasks(pack, tasks(), min(workers, len(missing)), len(missing), progress)
    files = {plan.split: plan.files() for plan in plans}
    report = {"arguments": arguments, "ignored_files": listing.ignored}
    if listing.coding:
        report["segmentation"] = {"classes": len(listing.classes), "labels_without_image": listing.lone_maps}
    if listing.category_ids:
        report["detection"] = {"classes": len(listing.classes)}
    finish(
        dest,
        listing.classes,
        files,
        report,
        lambda file: read_done(done_path(dest, file)),
        category_ids=listing.category_ids,
        notes=listing.notes,
    )


def _is_done(dest: Path, file: str) -> bool:
    """Whether the shard is finished: its `.done` file is written after it, and both are written atomically."""
    try:
        return (dest / file).stat().st_size == read_done(done_path(dest, file))[0]["shard"]["bytes"]
    except FileNotFoundError:
        return False


# --- FFCV ------------------------------------------------------------------------------------------------------------


def _without_beton(manifest: Manifest, mode: str | None) -> list[Split]:
    """The splits without an FFCV file, if `mode` asks for them."""
    betons = [split.beton for split in manifest.splits.values() if split.beton]
    if mode and any(beton.mode != mode for beton in betons):
        raise UsageError(
            f"{manifest.folder} has FFCV files of mode {betons[0].mode}, not {mode}: prepare another folder for those."
        )
    return [split for split in manifest.splits.values() if mode and not split.beton]


def _add_betons(dest: Path, mode: str | None, workers: int) -> bool:
    """Write each missing FFCV file from the finished shards and add it to the manifest.

    Returns whether any was missing.
    """
    manifest = open_manifest(dest)
    missing = _without_beton(manifest, mode)
    claim(dest, [f"{split.name}.beton{ending}" for split in missing for ending in ("", ".index")])
    for split in missing:
        from data_pipeline.preparation.beton import write_beton

        with Progress("images", f"{split.name}.beton", split.samples) as progress:
            beton = write_beton(split, dest / f"{split.name}.beton", mode=mode, workers=workers, progress=progress.show)
        manifest = replace(manifest, splits={**manifest.splits, split.name: replace(split, beton=beton)})
        write_manifest(manifest)
    return bool(missing)
