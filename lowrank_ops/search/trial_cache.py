"""A file of trials, so that an interrupted search resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..ranks.choose import ChosenRanks

_FORMAT = "lowrank_ops.trials/1"


class TrialCache:
    """Accuracies by ranks, one JSON line per trial, appended as they are measured.

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
        text = self._path.read_bytes().decode("utf-8", errors="replace")
        lines = text.split("\n")
        whole, torn = lines[:-1], lines[-1]  # a crash may have cut the last line
        try:
            head, *trials = [json.loads(line) for line in whole]
            if head["format"] != _FORMAT:
                raise KeyError("format")
            key = dict(head["key"])
            self._accuracies = {_name(trial["ranks"]): float(trial["accuracy"]) for trial in trials}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"cache={str(self._path)!r} is not a trial cache; name another file.") from None
        differing = [part for part in {**key, **self._key} if key.get(part) != self._key.get(part)]
        if differing:
            raise ValueError(
                f"cache={str(self._path)!r} holds trials with another {', another '.join(differing)}; name another "
                "file, or delete this one. (Calibrating again can change covariances: keep them by Covariances.save.)"
            )
        if torn:
            self._path.write_text("\n".join(whole) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._accuracies)

    def cached(self, measure: Callable[[ChosenRanks], float]) -> Callable[[ChosenRanks], float]:
        """``measure`` with its results stored here and looked up first."""

        def cached_measure(ranks: ChosenRanks) -> float:
            name = _name(ranks)
            if name not in self._accuracies:
                accuracy = measure(ranks)
                if self._is_new():
                    self._append({"format": _FORMAT, "key": self._key})
                self._append({"ranks": ranks, "accuracy": accuracy})
                self._accuracies[name] = accuracy
            return self._accuracies[name]

        return cached_measure

    def _append(self, line: Mapping[str, object]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _name(ranks: Mapping[str, int | None]) -> str:
    return json.dumps(dict(ranks), sort_keys=True)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and every byte."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        bytes_of = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(bytes_of.numpy().data)
    return found.hexdigest()[:16]
