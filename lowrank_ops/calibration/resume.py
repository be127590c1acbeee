"""The checkpoint of a calibration: after a kill it resumes, with a bit-identical result."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import digest, digests, open_checkpoint, replacing, write_tensors
from .covariances import Covariances
from .distributed import rank_and_world
from .recorder import Recorder

_FORMAT = "lowrank_ops.calibration/1"
SECONDS = 60  # between two writes in a pass; at least 20 times the duration of a write


class CalibrationCheckpoint:
    """A folder with ``state.safetensors``, the sums of the running pass, and one file per finished pass.

    Args:
        folder: created if it does not exist; with several processes, each has its own folder in it.
        identity: what must be equal for the calibration to resume, by name.
        passes: the layers of each pass. On resuming, the checkpoint's passes are used instead: the free memory may
            have changed.

    Raises:
        ValueError: the folder holds another calibration, or a damaged one.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], passes: Sequence[Sequence[str]]) -> None:
        rank, world = rank_and_world()
        self._folder = Path(folder) / f"rank-{rank}" if world > 1 else Path(folder)
        self._path = self._folder / "state.safetensors"
        self._identity = dict(identity)
        self.passes = [list(layers) for layers in passes]
        self._number, self._batches, self._seen, self._skipped = 0, 0, "", ""
        self._first = ""  # digest of the first batch
        self._start: list[Tensor] = []  # random states at the start of each pass
        self._state: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        self._last, self._cost = time.monotonic(), 0.0
        Path(folder).mkdir(exist_ok=True)
        self._folder.mkdir(exist_ok=True)
        if self._path.exists():
            self._read()

    def _read(self) -> None:
        with open_checkpoint(self._path, _FORMAT) as (header, tensors):
            identity, self.passes, self._number = header["identity"], header["passes"], header["number"]
            self._batches, self._seen, self._first = header["batches"], header["seen"], header.get("first", "")
            self._start = [tensors[f"start.{i}"] for i in range(header["generators"])]
            self._state = (header, tensors) if self._batches else None
        differ = [name for name in {**identity, **self._identity} if identity.get(name) != self._identity.get(name)]
        if differ:
            raise ValueError(
                f"checkpoint {str(self._folder)!r} is of another calibration: its {', '.join(differ)} differ. Use the "
                "same model, batches and arguments to resume, or another folder."
            )

    def finished(self, number: int, packed: bool) -> Covariances | None:
        """The statistics of a pass, if it was finished; ``packed`` as for :meth:`Covariances.load`."""
        if number >= self._number:
            return None
        try:
            return Covariances.load(self._file(number), packed=packed)
        except FileNotFoundError:
            raise ValueError(
                f"checkpoint {str(self._folder)!r} lacks the file {self._file(number).name!r} of a finished pass. "
                "Delete the folder to start again."
            ) from None

    def check_first(self, batches: Iterable[Any], generators: Sequence[torch.Generator]) -> None:
        """Raise ValueError if finished passes began with another batch; with none left to run, none need be given."""
        if self._batches or not self._first:  # the batches of a pass that goes on are all compared
            return
        for generator, state in zip(generators, self._start, strict=False):  # a GPU may be missing now
            generator.set_state(state)  # as in begin, for a DataLoader that shuffles
        first = next(iter(batches), None)
        if first is not None and digest(first) != self._first:
            raise self._other_batches()

    def begin(self, recorder: Recorder, generators: Sequence[torch.Generator]) -> int:
        """Restore the sums of the pass and the random states of its start; return the number of batches to skip."""
        self._start = self._start or [generator.get_state() for generator in generators]
        for generator, state in zip(generators, self._start, strict=True):
            generator.set_state(state)  # every pass draws the same labels, also in another process
        recorder.seed = digest(self._start[0])
        if self._state is not None:
            header, tensors = self._state
            recorder.restore(header["recorder"], tensors)
        self._skipped = ""
        return self._batches

    def skip(self, index: int, batch: Any, generators: Sequence[torch.Generator]) -> None:
        """Check a batch that was added before the restart; after the last one restore the random states.

        Raises:
            ValueError: it is another batch.
        """
        self._skipped = digest([self._skipped, batch])
        if index + 1 < self._batches:
            return
        if self._skipped != self._seen:
            raise self._other_batches()
        assert self._state is not None
        _, tensors = self._state
        for i, generator in enumerate(generators):
            generator.set_state(tensors[f"now.{i}"])
        self._state = None

    def add(self, batch: Any, recorder: Recorder, generators: Sequence[torch.Generator]) -> None:
        """Count an added batch, and write the state if ``SECONDS`` have passed."""
        self._first = self._first or digest(batch)
        self._seen = digest([self._seen, batch])
        self._batches += 1
        if time.monotonic() - self._last >= max(SECONDS, 20 * self._cost):
            header, tensors = recorder.state()
            tensors |= {f"now.{i}": generator.get_state() for i, generator in enumerate(generators)}
            self._write({"recorder": header}, tensors)

    def end(self, number: int, covariances: Covariances) -> None:
        """Write the statistics of a finished pass."""
        covariances.save(self._file(number))
        self._number, self._state, self._batches, self._seen = number + 1, None, 0, ""
        self._write({}, {})

    def _write(self, more: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        begun = time.monotonic()
        tensors = {**tensors, **{f"start.{i}": state for i, state in enumerate(self._start)}}
        header = {
            "format": _FORMAT,
            "identity": self._identity,
            "passes": self.passes,
            "number": self._number,
            "batches": self._batches,
            "seen": self._seen,
            "first": self._first,
            "generators": len(self._start),
            "checksums": digests(tensors),
            **more,
        }
        with replacing(self._path) as (file,):
            write_tensors(file, tensors, header)
        self._last = time.monotonic()
        self._cost = self._last - begun

    def _other_batches(self) -> ValueError:
        return ValueError(
            f"checkpoint {str(self._folder)!r} is of another calibration: its batches differ. Use the same batches in "
            "the same order to resume, or another folder."
        )

    def _file(self, number: int) -> Path:
        return self._folder / f"pass-{number + 1}.safetensors"
