"""The meaning of `--resume`, decided once, before torch is imported."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint.info import CheckpointError, CheckpointInfo, list_checkpoints, read_info
from train.config import Config, ConfigError, differences, parse_config

NAMED = 8  # changed settings in an error


@dataclass(frozen=True)
class Resume:
    """Where a start of a run resumes from.

    checkpoints: the run's folder of checkpoints. checkpoint: the one that was named; None: the newest of the run's own.
    never: the run must not have checkpoints. begins: the run has no checkpoint, and starts from its first weights.
    with_changes: resume although settings changed that alter what a step computes.
    """

    checkpoints: Path
    checkpoint: Path | None
    never: bool
    begins: bool
    with_changes: bool

    @staticmethod
    def decide(output: Path, resume: str, with_changes: bool) -> "Resume":
        """resume: "auto", "never" or a checkpoint's path, of a run in the folder `output`."""
        checkpoints = output / "checkpoints"
        checkpoint = None if resume in ("auto", "never") else Path(resume)
        begins = checkpoint is None and not list_checkpoints(checkpoints)
        return Resume(checkpoints, checkpoint, resume == "never", begins, with_changes)

    def candidates(self) -> list[Path]:
        """The checkpoints to go on from, the preferred one first.

        Started again with the same named checkpoint, a run goes on from the newest that it has saved since it began
        there.
        """
        own = list_checkpoints(self.checkpoints)
        if self.checkpoint is None:
            return own
        since = []
        for path in own:
            with contextlib.suppress(CheckpointError):
                if read_info(path).began == self.name_of(self.checkpoint):
                    since.append(path)
        return [*since, self.checkpoint]

    def name_of(self, checkpoint: Path) -> str:
        """How CheckpointInfo.began names a checkpoint: by its name in the run's own folder, by its path elsewhere."""
        return checkpoint.name if self.is_own(checkpoint) else str(checkpoint.resolve())

    def is_own(self, checkpoint: Path) -> bool:
        """Whether the checkpoint is in the run's own folder."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def check_settings(self, path: Path, info: CheckpointInfo, config: Config, *others: str) -> list[str]:
        """What changed since the checkpoint `path`, as sentences. others: changes that the settings do not show.

        Raises ConfigError if some of it alters what a step computes, unless the run is to resume with changes.
        """
        before = settings_of(path, info)
        old, new = before.model_dump(mode="json"), config.model_dump(mode="json")
        changed = [*differences(old, new, free=False), *others]
        if changed and not self.with_changes:
            kind, own = (f"{each.model.name}, {each.task.name}" for each in (before, config))
            if kind != own:
                remedy = "choose another --output" if self.is_own(path) else "take it as model.init_from"
                raise ConfigError(f"{path} is of a run of {kind}; this is one of {own}: {remedy}")
            more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
            raise ConfigError(
                f"{path} was trained with other settings: {', '.join(changed[:NAMED])}{more}; set them back, choose "
                "another --output, or give --resume-with-changes to go on all the same"
            )
        return changed + differences(old, new, free=True)


def settings_of(path: Path, info: CheckpointInfo) -> Config:
    """The settings of a checkpoint's run, with the defaults of keys that it does not have. Raises CheckpointError."""
    try:
        return parse_config(info.config, source=str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error  # its text quotes values of an untrusted file
