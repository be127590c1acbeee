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
SIDES = ("input", "output")
GRADIENT = "gradient"
WEIGHTED = "weighted "  # before the side


class NonFiniteActivationError(ValueError):
    """NaN or inf in an activation or a gradient during calibration; the message names the layer and the batch."""


@dataclass
class Covariance:
    """Sums over the rows that a layer has seen.

    Attributes:
        second_moment: sum of x x^T, (features, features), or (groups, features, features) for grouped convolutions.
        total: sum of x, (features,) or (groups, features).
        count: number of rows; for gradients the number of samples whose loss they belong to, so that the moments
            of layers that see few or many rows of a sample compare.
        side: ``"input"``, or ``"output"`` where the bias-free output was streamed instead; ``"gradient"`` for the
            gradient of the loss at the layer's output; ``"weighted input"`` or ``"weighted output"`` for rows that
            are weighed with what the loss feels of them: sums of w x x^T and w x, the mean of w in a sample being 1.
        layers: names of the layers that received these very rows.
        weighted: of a gradient, the weighted rows of its layer's streamed side, where they were asked for.
    """

    second_moment: Tensor
    total: Tensor
    count: int = 0
    side: str = "input"
    layers: list[str] = field(default_factory=list)
    weighted: Covariance | None = None

    @property
    def mean(self) -> Tensor:
        """E[x], float64; zero where no row was seen."""
        return self.total.double() / max(self.count, 1)

    @property
    def rounding(self) -> float:
        """Relative rounding error of the sums: up to n eps for n equal rows, less where products add in blocks."""
        return min(self.count * torch.finfo(self.second_moment.dtype).eps, 1e-5)

    def plus(self, other: Covariance) -> Covariance:
        """The sums over the rows of both, in the dtype of this one; ``weighted`` is left out."""
        return Covariance(
            self.second_moment + other.second_moment.to(self.second_moment),
            self.total + other.total.to(self.total),
            self.count + other.count,
            self.side,
            list(self.layers),
        )

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
        sensitivities: ``{fqn: Covariance}`` of the loss's gradient at the layers' outputs, where it was streamed, each
            with the layer's weighted rows.
    """

    def __init__(self) -> None:
        self._layers: dict[str, Covariance] = {}
        self.unreached: tuple[str, ...] = ()
        self.skipped: dict[str, str] = {}
        self.sensitivities: dict[str, Covariance] = {}

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
        """Bytes held by the distinct statistics and the sensitivities."""
        return sum(
            tensor.numel() * tensor.element_size()
            for covariance in self._everything()
            for tensor in (covariance.second_moment, covariance.total)
        )

    def merge(self, other: Covariances) -> Covariances:
        """The statistics of both, as if one run had seen all rows.

        Raises:
            ValueError: the two do not describe the same layers in the same way.
        """
        shapes, others = self._shapes(), other._shapes()
        if shapes != others:
            differ = [key for key in {**shapes, **others} if shapes.get(key) != others.get(key)]
            raise ValueError(
                f"other must hold the same layers, shapes, sides and sharing; it differs at {', '.join(differ)}. "
                "Calibrate both with the same model, filter_fn, side, sensitivity and weigh_rows."
            )
        merged = Covariances()
        for mine in self._everything():
            merged._add(mine.plus(other._find(mine.layers[0], mine.side)))
        merged._sort(self)
        merged.unreached, merged.skipped = self.unreached, dict(self.skipped)
        return merged

    def all_reduce_(self, group: torch.distributed.ProcessGroup | None = None) -> Covariances:
        """Sum over the processes of ``torch.distributed``, in place; every process ends with the whole.

        Raises:
            ValueError: the processes hold different layers, as when one of them never reached a layer.
        """
        shapes: list[object] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(shapes, self._shapes(), group=group)
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError("all_reduce_ needs the same layers, sides and sharing in every process; they differ.")
        for covariance in self._everything():
            count = torch.tensor(covariance.count, device=covariance.total.device)
            for tensor in (covariance.second_moment, covariance.total, count):
                torch.distributed.all_reduce(tensor, group=group)
            covariance.count = int(count)
        return self

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors, entries = {}, []
        for index, covariance in enumerate(self._everything()):
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

    def _everything(self) -> list[Covariance]:
        """All sums; weighted ones after all gradients, which they belong to."""
        gradients = self.sensitivities.values()
        weighted = [gradient.weighted for gradient in gradients if gradient.weighted is not None]
        return [*self.statistics(), *gradients, *weighted]

    def _shapes(self) -> dict[str, object]:
        """What two objects must have in common to be added, by a name for the reader."""
        own: dict[str, object] = {fqn: _shape(covariance) for fqn, covariance in self.items()}
        of_loss = [covariance for covariance in self._everything() if covariance.side not in SIDES]
        return own | {f"{covariance.side} of {covariance.layers[0]}": _shape(covariance) for covariance in of_loss}

    def _find(self, fqn: str, side: str) -> Covariance:
        if side in SIDES:
            return self[fqn]
        gradient = self.sensitivities[fqn]
        if side == GRADIENT:
            return gradient
        assert gradient.weighted is not None
        return gradient.weighted

    def _add(self, covariance: Covariance) -> None:
        for fqn in covariance.layers:
            if covariance.side in SIDES:
                self._layers[fqn] = covariance
            elif covariance.side == GRADIENT:
                self.sensitivities[fqn] = covariance
            else:
                self.sensitivities[fqn].weighted = covariance

    def _sort(self, order: Mapping[str, object] | list[str]) -> None:
        self._layers = {fqn: self._layers[fqn] for fqn in order if fqn in self._layers}
        self.sensitivities = {fqn: self.sensitivities[fqn] for fqn in order if fqn in self.sensitivities}


def _shape(covariance: Covariance) -> tuple[object, ...]:
    return tuple(covariance.second_moment.shape), covariance.side, tuple(covariance.layers)
