"""Sums over the activations and output gradients of a model's layers, as calibration streams them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked
from ..files import digests, open_tensors, read_header, read_tensor, replacing, write_tensors

_FORMAT = "lowrank_ops.covariances/2"
_FORMAT_1 = "lowrank_ops.covariances/1"
SIDES = ("input", "output")


class NonFiniteActivationError(ValueError):
    """NaN or inf in an activation or a gradient during calibration; the message names the layer and the batch."""


@dataclass
class Moments:
    """First and second moments of rows, as sums.

    Attributes:
        second_moment: sum of x x^T, (features, features), or (groups, features, features) for grouped convolutions.
        total: sum of x, (features,) or (groups, features).
        count: number of rows.
    """

    second_moment: Tensor
    total: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Moments:
        """Empty sums for rows of ``shape``, (features,) or (groups, features)."""
        second_moment = torch.zeros(*shape, shape[-1], dtype=dtype, device=device)
        return cls(second_moment, torch.zeros(shape, dtype=dtype, device=device))

    @property
    def mean(self) -> Tensor:
        """E[x], float64; zero if there are no rows."""
        return self.total.double() / max(self.count, 1)

    @property
    def rounding(self) -> float:
        """Relative rounding error of the sums: at most n eps for n equal rows, less with blocked summation."""
        return min(self.count * torch.finfo(self.second_moment.dtype).eps, 1e-5)

    def moment(self, *, centered: bool) -> Tensor:
        """E[x x^T], about the mean if ``centered``, float64.

        A feature whose variance is below the rounding error of its squared mean is constant: its variance is 0.
        """
        moment = self.second_moment.double() / max(self.count, 1)
        if centered:
            mean = self.mean
            for matrix, row in [(moment, mean)] if mean.dim() == 1 else zip(moment, mean, strict=True):
                matrix.addr_(row, row, alpha=-1)
            varies = moment.diagonal(dim1=-2, dim2=-1) > self.rounding * mean.square()
            if not bool(varies.all()):
                moment *= varies.unsqueeze(-1) & varies.unsqueeze(-2)
        return moment

    def check(self) -> None:
        """Raise ValueError for what no rows have as their sums; the message has no subject."""
        second_moment, total, count = self.second_moment, self.total, self.count
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"has count {count!r}, which is not a number of rows")
        if second_moment.dtype != total.dtype or total.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"has a second_moment of {second_moment.dtype} and a total of {total.dtype}; both must be float64, or "
                "both float32"
            )
        if total.dim() not in (1, 2) or second_moment.shape != (*total.shape, total.shape[-1]):
            raise ValueError(
                f"has a second_moment of shape {tuple(second_moment.shape)} and a total of {tuple(total.shape)}; they "
                "must be (features, features) and (features,), with groups before both"
            )
        for name, sums in (("second_moment", second_moment), ("total", total)):
            if not bool(sums.isfinite().all()):
                raise ValueError(f"has NaN or inf in its {name}")
        if bool((second_moment.diagonal(dim1=-2, dim2=-1) < 0).any()):
            raise ValueError("has a negative sum of squares in its second_moment")

    def plus(self, other: Moments) -> Moments:
        """The sums over the rows of both, in the dtype of this one."""
        return Moments(
            self.second_moment + other.second_moment.to(self.second_moment),
            self.total + other.total.to(self.total),
            self.count + other.count,
        )


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration measured of one layer.

    Attributes:
        side: which activation was streamed, ``"input"`` or ``"output"`` (without the bias).
        activations: moments of that activation. Layers that received the same tensor share one object.
        output_gradients: moments of the loss's gradient at the layer's output (K-FAC's G), or None. ``count`` is the
            number of samples, not rows, so that layers with different numbers of rows per sample can be compared.
        token_weighted: moments of the same activation with token weights: sums of w x x^T and w x, where w = |g|^2
            over its mean in the sample. None where they were not streamed.
    """

    side: str
    activations: Moments
    output_gradients: Moments | None = None
    token_weighted: Moments | None = None

    def moments(self) -> dict[str, Moments]:
        """``{field: Moments}`` of what was streamed."""
        found = {name: getattr(self, name) for name in _MOMENTS}
        return {name: moments for name, moments in found.items() if moments is not None}

    def dtypes(self) -> dict[str, torch.dtype]:
        """``{field: dtype of its sums}``."""
        return {name: moments.second_moment.dtype for name, moments in self.moments().items()}

    def check(self) -> None:
        """Raise ValueError for sums that no rows have; the message begins with the field."""
        if self.side not in SIDES:
            raise ValueError(f"side is {self.side!r}, not one of {', '.join(map(repr, SIDES))}")
        for name, moments in self.moments().items():
            try:
                moments.check()
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None


_MOMENTS = tuple(field.name for field in fields(LayerStatistics) if field.name != "side")


class Covariances(Mapping[str, LayerStatistics]):
    """``{fqn: LayerStatistics}`` in the model's order, as :func:`lowrank_ops.calibrate` returns it.

    Attributes:
        unreached: layers that no batch reached.
        skipped: ``{fqn: reason}`` of the layers that calibration left out.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> covariances = lro.calibrate(model, [torch.randn(32, 8)])
        >>> covariances
        Covariances(2 layers, 0 shared, 0.0 MiB)
        >>> covariances["2"].activations.second_moment.shape
        torch.Size([16, 16])
    """

    @checked()
    def __init__(
        self,
        layers: Mapping[str, LayerStatistics] | None = None,
        unreached: tuple[str, ...] = (),
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self._layers = dict(layers or {})
        self.unreached = unreached
        self.skipped = dict(skipped or {})

    def __getitem__(self, fqn: str) -> LayerStatistics:
        return self._layers[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        shared = len(self) - len({id(layer.activations) for layer in self.values()})
        return f"Covariances({len(self)} layers, {shared} shared, {self.memory() / 2**20:.1f} MiB)"

    @property
    def has_output_gradients(self) -> bool:
        """Whether output gradients were streamed, for any layer."""
        return any(layer.output_gradients is not None for layer in self.values())

    @property
    def has_token_weights(self) -> bool:
        """Whether token-weighted moments were streamed, for any layer."""
        return any(layer.token_weighted is not None for layer in self.values())

    def memory(self) -> int:
        """Bytes held by all moments, each shared one counted once."""
        tensors = (tensor for moments in self._distinct() for tensor in (moments.second_moment, moments.total))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @checked()
    def merge(self, other: Covariances) -> Covariances:
        """The statistics of both, as if one run had seen all rows.

        Raises:
            ValueError: the two hold other layers, sides or sharing.
        """
        mine, others = self._layout(), other._layout()
        if mine != others:
            differ = [fqn for fqn in {**mine, **others} if mine.get(fqn) != others.get(fqn)]
            raise ValueError(
                f"other must hold the same layers, shapes, sides and sharing; it differs at {', '.join(differ)}. "
                "Calibrate both with the same model, filter_fn, side, sensitivity and token_weights."
            )
        merged: dict[int, Moments] = {}  # shared moments stay shared
        layers = {}
        for fqn, layer in self.items():
            for name, moments in layer.moments().items():
                if id(moments) not in merged:
                    merged[id(moments)] = moments.plus(other[fqn].moments()[name])
            layers[fqn] = LayerStatistics(layer.side, **{name: merged[id(m)] for name, m in layer.moments().items()})
        return Covariances(layers, self.unreached, self.skipped)

    def all_reduce_(self, group: torch.distributed.ProcessGroup | None = None) -> Covariances:
        """Sum over the processes of ``torch.distributed``, in place; every process ends with the whole.

        Raises:
            ValueError: the processes hold different layers, as when one of them never reached a layer, or sums of
                different dtypes; raised in every process, before any sum is changed.
        """
        mine = [(fqn, part, self[fqn].dtypes()) for fqn, part in self._layout().items()]
        layouts: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(layouts, mine, group=group)
        if any(layout != layouts[0] for layout in layouts):
            # A layer counts at its place: the order decides which sums meet.
            rows = zip_longest(*layouts, fillvalue=("(no layer)",))
            differ = sorted({row[0] for at_place in rows for row in at_place if row != at_place[0]})
            raise ValueError(
                "all_reduce_ needs the same layers, sides, sharing and dtype in every process; they differ at "
                f"{', '.join(differ)}. Calibrate every process with the same arguments, and with batches that reach "
                "the same layers."
            )
        for moments in self._distinct():
            count = torch.tensor(moments.count, device=moments.total.device)
            for tensor in (moments.second_moment, moments.total, count):
                torch.distributed.all_reduce(tensor, group=group)
            moments.count = int(count)
        return self

    @checked()
    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the whole file, or on an exception nothing.

        Raises:
            OSError: the file cannot be written.
        """
        distinct = self._distinct()
        index = {id(moments): i for i, moments in enumerate(distinct)}
        tensors = {}
        for i, moments in enumerate(distinct):
            tensors[f"{i}.second_moment"] = moments.second_moment
            tensors[f"{i}.total"] = moments.total
        header = {
            "format": _FORMAT,
            "counts": [moments.count for moments in distinct],
            "layers": {
                fqn: {"side": layer.side} | {name: index[id(part)] for name, part in layer.moments().items()}
                for fqn, layer in self.items()
            },
            "unreached": self.unreached,
            "skipped": self.skipped,
            "checksums": digests(tensors),
        }
        with replacing(Path(path)) as (file,):
            write_tensors(file, tensors, header)

    @classmethod
    @checked()
    def load(cls, path: str | Path, *, verify: bool = True) -> Covariances:
        """Read what :meth:`save` wrote, by this version or an earlier one.

        Args:
            path: of the file.
            verify: compare the tensors with their checksums, which reads every byte; version 1 has none.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, was not written by :meth:`save`, or holds sums that no rows have.
        """
        try:
            with open_tensors(path) as file:
                header = read_header(file, verify=verify)
                checksums = None
                if header["format"] == _FORMAT_1:
                    header = _from_format_1(header)
                elif header["format"] != _FORMAT:
                    raise ValueError(f"its format is {header['format']!r}, this version reads {_FORMAT!r}")
                elif verify:
                    checksums = header["checksums"]
                _check_header(header)
                moments = [
                    Moments(
                        read_tensor(file, f"{i}.second_moment", checksums),
                        read_tensor(file, f"{i}.total", checksums),
                        count,
                    )
                    for i, count in enumerate(header["counts"])
                ]
            layers = {
                fqn: LayerStatistics(
                    entry["side"], **{name: moments[entry[name]] for name in _MOMENTS if name in entry}
                )
                for fqn, entry in header["layers"].items()
            }
            for fqn, layer in layers.items():
                try:
                    layer.check()
                except ValueError as error:
                    raise ValueError(f"layer {fqn!r}: {error}") from None
        except FileNotFoundError:
            raise
        except ValueError as error:
            raise ValueError(
                f"path {str(path)!r} is not a whole file written by Covariances.save: {error}. Copy it again, or "
                "calibrate again."
            ) from None
        return cls(layers, tuple(header["unreached"]), header["skipped"])

    def _distinct(self) -> list[Moments]:
        """All moments, each once, in an order that equal layouts share."""
        return list({id(part): part for layer in self.values() for part in layer.moments().values()}.values())

    def _layout(self) -> dict[str, object]:
        """What two objects must have in common to be added, by layer."""
        sharing: dict[int, list[str]] = {}
        for fqn, layer in self.items():
            sharing.setdefault(id(layer.activations), []).append(fqn)
        return {
            fqn: (
                layer.side,
                sharing[id(layer.activations)],
                {name: tuple(part.second_moment.shape) for name, part in layer.moments().items()},
            )
            for fqn, layer in self.items()
        }


def _check_header(header: Mapping[str, Any]) -> None:
    """Raise ValueError for a header that :meth:`Covariances.save` does not write."""
    counts, layers = header["counts"], header["layers"]
    if not isinstance(counts, list) or not isinstance(layers, dict):
        raise ValueError("its 'counts' or 'layers' has the wrong type")
    for fqn, entry in layers.items():
        if not isinstance(entry, dict) or set(entry) - {"side", *_MOMENTS} or not {"side", "activations"} <= set(entry):
            raise ValueError(f"its entry of layer {fqn!r} is not one of {{side, activations, ...}}: {entry!r}")
        for name in set(entry) - {"side"}:
            index = entry[name]
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(counts):
                raise ValueError(f"layer {fqn!r} has {name} {index!r}, which is not one of its {len(counts)} moments")
    used = {entry[name] for entry in layers.values() for name in set(entry) - {"side"}}
    if len(used) != len(counts):
        raise ValueError("it holds moments of no layer")
    unreached, skipped = header["unreached"], header["skipped"]
    if not isinstance(unreached, list) or not all(isinstance(fqn, str) for fqn in unreached):
        raise ValueError("its 'unreached' is not a list of names")
    if not isinstance(skipped, dict) or not all(isinstance(reason, str) for reason in skipped.values()):
        raise ValueError("its 'skipped' is not a mapping of names to reasons")


def _from_format_1(header: Mapping[str, Any]) -> dict[str, Any]:
    """A header of version 1, where ``side`` also said what the moments were of, in the present form."""
    fields_of = {"gradient": "output_gradients"} | {f"weighted {side}": "token_weighted" for side in SIDES}
    layers: dict[str, dict[str, Any]] = {fqn: {} for fqn in header["order"]}
    for index, entry in enumerate(header["entries"]):
        for fqn in entry["layers"]:
            if fqn not in layers:
                if entry["side"] in SIDES or fqn not in header["unreached"]:  # a gradient may be of an unreached layer
                    raise ValueError(f"it holds moments of layer {fqn!r}, which is not one of its layers")
                continue
            if entry["side"] in SIDES:
                layers[fqn] |= {"side": entry["side"], "activations": index}
            else:
                layers[fqn][fields_of[entry["side"]]] = index
    return {
        "counts": [entry["count"] for entry in header["entries"]],
        "layers": layers,
        "unreached": header["unreached"],
        "skipped": header["skipped"],
    }
