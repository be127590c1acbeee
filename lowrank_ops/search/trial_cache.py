"""A file of trials, so that an interrupted search resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files import digest, parse_json, write_whole
from ..ranks.choose import ChosenRanks

_FORMAT = "lowrank_ops.trials/2"
_FORMAT_1 = "lowrank_ops.trials/1"  # without checksums
_CHECKSUM = "sha256"


class TrialCache:
    """Accuracies by ranks, one JSON line with a checksum per trial, appended as they are measured.

    Args:
        path: of the file; created with the first trial.
        key: what the accuracies depend on besides the ranks, ``{part: digest}``.

    Raises:
        ValueError: the file holds something else, or trials of another key (the message names the parts); the folder
            does not exist, or ``path`` is one.
    """

    def __init__(self, path: str | Path, key: Mapping[str, str]) -> None:
        self._path = Path(path)
        self._key = dict(key)
        self._accuracies: dict[str, float] = {}
        if self._path.is_dir():
            raise ValueError(f"cache={str(self._path)!r} is a folder; name a file.")
        if not self._path.absolute().parent.is_dir():  # before the first trial, which may take long
            raise ValueError(f"cache={str(self._path)!r} is in a folder that does not exist; create it first.")
        if not self._is_new():
            self._read()

    def _is_new(self) -> bool:
        return not self._path.exists() or not self._path.stat().st_size

    def _read(self) -> None:
        content = self._path.read_bytes()
        if b"\n" not in content and self._first_line().startswith(content):  # a crash has cut the first line
            self._path.write_bytes(b"")
            return
        *whole, torn = content.split(b"\n")  # a crash may have cut the last line
        try:
            head, *trials = [_parsed(line) for line in whole]
            if head["format"] not in (_FORMAT, _FORMAT_1):
                raise KeyError("format")
            if head["format"] == _FORMAT and not all(_CHECKSUM in line for line in (head, *trials)):
                raise KeyError(_CHECKSUM)
            key = dict(head["key"])
            self._accuracies = dict(map(_trial, trials))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"cache={str(self._path)!r} is damaged or is not a trial cache; name another file."
            ) from None
        differing = [part for part in {**key, **self._key} if key.get(part) != self._key.get(part)]
        if differing:
            raise ValueError(
                f"cache={str(self._path)!r} holds trials with another {', another '.join(differing)}; name another "
                "file, or delete this one. (Calibrating again can change covariances: keep them by Covariances.save.)"
            )
        if torn:
            write_whole(self._path, b"\n".join([*whole, b""]))

    def _first_line(self) -> bytes:
        return _line({"format": _FORMAT, "key": self._key})

    def __len__(self) -> int:
        return len(self._accuracies)

    def cached(self, measure: Callable[[ChosenRanks], float]) -> Callable[[ChosenRanks], float]:
        """``measure`` with its results stored here and looked up first."""

        def cached_measure(ranks: ChosenRanks) -> float:
            name = _name(ranks)
            if name not in self._accuracies:
                accuracy = measure(ranks)
                if self._is_new():
                    self._append(self._first_line())
                self._append(_line({"ranks": ranks, "accuracy": accuracy}))
                self._accuracies[name] = accuracy
            return self._accuracies[name]

        return cached_measure

    def _append(self, line: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _line(values: Mapping[str, object]) -> bytes:
    return json.dumps({**values, _CHECKSUM: digest(json.dumps(values))}).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """The values of a line; raises for one that differs from its checksum."""
    values = dict(parse_json(line))
    rest = {name: value for name, value in values.items() if name != _CHECKSUM}
    if _CHECKSUM in values and values[_CHECKSUM] != digest(json.dumps(rest)):
        raise ValueError("checksum")
    return values


def _trial(values: Mapping[str, Any]) -> tuple[str, float]:
    """The name and accuracy of a trial; raises for what :class:`TrialCache` does not write."""
    ranks, accuracy = values["ranks"], values["accuracy"]
    for rank in ranks.values() if isinstance(ranks, dict) else [ranks]:
        if rank is not None and (type(rank) is not int or rank < 0):
            raise ValueError(f"rank {rank!r}")
    if type(accuracy) not in (int, float) or not math.isfinite(accuracy):
        raise ValueError(f"accuracy {accuracy!r}")
    return _name(ranks), float(accuracy)


def _name(ranks: Mapping[str, int | None]) -> str:
    return json.dumps(dict(ranks), sort_keys=True)
