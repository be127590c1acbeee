"""Second moments and sums of layers' activations: what calibration hands to the rest of the pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "lowrank_ops.covariances/1"


@dataclass
class Covariance:
    """Sums over the rows that a layer has seen.

    Attributes:
        second_moment: sum of x x^T, (features, features), or (groups, features, features) for grouped convolutions.
        total: sum of x, (features,) or (groups, features).
        count: number of rows.
        side: ``"input"``, or ``"output"`` where the bias-free output was streamed instead.
        layers: names of the layers that received these very rows.
    """

    second_moment: Tensor
    total: Tensor
    count: int = 0
    side: str = "input"
    layers: list[str] = field(default_factory=list)

    @property
    def mean(self) -> Tensor:
        """E[x], float64; zero where no row was seen."""
        return self.total.double() / max(self.count, 1)

    @property
    def rounding(self) -> float:
        """Relative rounding error of the sums: up to n eps for n equal rows, less where products add in blocks."""
        return min(self.count * torch.finfo(self.second_moment.dtype).eps, 1e-5)

    def moment(self, *, centered: bool) -> Tensor:
        """E[x x^T], about the mean if ``centered``, float64.

        A feature whose variance is lost in the rounding of the sums beside its mean is constant: its variance is 0.
        """
        moment = self.second_moment.double() / max(self.count, 1)
        if centered:
            mean = self.mean
            moment -= mean.unsqueeze(-1) * mean.unsqueeze(-2)
            varies = moment.diagonal(dim1=-2, dim2=-1) > self.rounding * mean.square()
            moment *= varies.unsqueeze(-1) & varies.unsqueeze(-2)
        return moment


class Covariances(Mapping[str, Covariance]):
    """``{fqn: Covariance}`` in the model's order. Layers that received the same tensors share one object.

    Attributes:
        unreached: layers that no batch went through.
        skipped: ``{fqn: reason}`` of modules that calibration cannot see into.
    """

    def __init__(self) -> None:
        self._layers: dict[str, Covariance] = {}
        self.unreached: tuple[str, ...] = ()
        self.skipped: dict[str, str] = {}

    def __getitem__(self, fqn: str) -> Covariance:
        return self._layers[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        shared = len(self._layers) - len(self.statistics())
        return f"Covariances({len(self)} layers, {shared} shared, {self.memory() / 2**20:.1f} MiB)"

    def statistics(self) -> list[Covariance]:
        """The distinct statistics, each once however many layers share it."""
        return list({id(covariance): covariance for covariance in self._layers.values()}.values())

    def memory(self) -> int:
        """Bytes held by the distinct statistics."""
        return sum(
            tensor.numel() * tensor.element_size()
            for covariance in self.statistics()
            for tensor in (covariance.second_moment, covariance.total)
        )

    def merge(self, other: Covariances) -> Covariances:
        """The statistics of both, as if one run had seen all rows.

        Raises:
            ValueError: the two do not describe the same layers in the same way.
        """
        if {fqn: _shape(self[fqn]) for fqn in self} != {fqn: _shape(other[fqn]) for fqn in other}:
            differ = [fqn for fqn in {**self, **other} if _shape(self.get(fqn)) != _shape(other.get(fqn))]
            raise ValueError(
                f"other must hold the same layers, shapes, sides and sharing; it differs at {', '.join(differ)}. "
                "Calibrate both with the same model, filter_fn and side."
            )
        merged = Covariances()
        for mine in self.statistics():
            theirs = other[mine.layers[0]]
            merged._add(
                Covariance(
                    mine.second_moment + theirs.second_moment.to(mine.second_moment),
                    mine.total + theirs.total.to(mine.total),
                    mine.count + theirs.count,
                    mine.side,
                    list(mine.layers),
                )
            )
        merged._sort(self)
        merged.unreached, merged.skipped = self.unreached, dict(self.skipped)
        return merged

    def all_reduce_(self, group: torch.distributed.ProcessGroup | None = None) -> Covariances:
        """Sum over the processes of ``torch.distributed``, in place; every process ends with the whole.

        Raises:
            ValueError: the processes hold different layers, as when one of them never reached a layer.
        """
        shapes: list[object] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(shapes, {fqn: _shape(self[fqn]) for fqn in self}, group=group)
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError("all_reduce_ needs the same layers, sides and sharing in every process; they differ.")
        for covariance in self.statistics():
            count = torch.tensor(covariance.count, device=covariance.total.device)
            for tensor in (covariance.second_moment, covariance.total, count):
                torch.distributed.all_reduce(tensor, group=group)
            covariance.count = int(count)
        return self

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors, entries = {}, []
        for index, covariance in enumerate(self.statistics()):
            tensors[f"{index}.second_moment"] = covariance.second_moment.contiguous().cpu()
            tensors[f"{index}.total"] = covariance.total.contiguous().cpu()
            entries.append({"count": covariance.count, "side": covariance.side, "layers": covariance.layers})
        header = {
            "format": _FORMAT,
            "order": list(self),
            "entries": entries,
            "unreached": self.unreached,
            "skipped": self.skipped,
        }
        Path(path).touch()
        mode = Path(path).stat().st_mode
        save_file(tensors, path, metadata={"lowrank_ops": json.dumps(header)})
        Path(path).chmod(mode)  # safetensors makes files private

    @classmethod
    def load(cls, path: str | Path) -> Covariances:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is truncated or not one of ours.
        """
        covariances = cls()
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["lowrank_ops"])
                if header["format"] != _FORMAT:
                    raise ValueError(f"its format is {header['format']!r}, this version reads {_FORMAT!r}")
                for index, entry in enumerate(header["entries"]):
                    second_moment = file.get_tensor(f"{index}.second_moment")
                    covariances._add(Covariance(second_moment, file.get_tensor(f"{index}.total"), **entry))
                covariances._sort(header["order"])
                covariances.unreached, covariances.skipped = tuple(header["unreached"]), header["skipped"]
        except FileNotFoundError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"path {str(path)!r} is not a whole file written by Covariances.save: {error}.") from None
        return covariances

    def _add(self, covariance: Covariance) -> None:
        for fqn in covariance.layers:
            self._layers[fqn] = covariance

    def _sort(self, order: Mapping[str, object] | list[str]) -> None:
        self._layers = {fqn: self._layers[fqn] for fqn in order if fqn in self._layers}


def _shape(covariance: Covariance | None) -> tuple[object, ...] | None:
    if covariance is None:
        return None
    return tuple(covariance.second_moment.shape), covariance.side, tuple(covariance.layers)
