"""Sums over the activations and output gradients of a model's layers, as calibration streams them."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import checked
from ..files import digests, open_tensors, read_header, read_tensor, replacing, write_tensors
from ..models.layers import all_finite
from ..models.running import float64_device, has_float64
from ..ops import covariance_finalize_
from .distributed import wait_for_all

_FORMAT = "lowrank_ops.covariances/3"
_FORMAT_1, _FORMAT_2 = "lowrank_ops.covariances/1", "lowrank_ops.covariances/2"
SIDES = ("input", "output")


class NonFiniteActivationError(ValueError):
    """NaN or inf in an activation or a gradient during calibration; the message names the layer and the batch."""


class Moments:
    """First and second moments of rows, as sums about a shift.

    Rows whose mean is large beside their spread would lose the spread in sums about zero. :attr:`mean` and
    :meth:`moment` do not depend on the shift.

    Attributes:
        second_moment: sum of (x - shift) (x - shift)^T, (features, features), or (groups, features, features) for
            grouped convolutions.
        total: sum of x - shift, (features,) or (groups, features).
        count: number of rows.
        shift: of the shape of ``total``, any float dtype; None is zero.
    """

    shift: Tensor | None = None

    def __init__(self, second_moment: Tensor, total: Tensor, count: int = 0, shift: Tensor | None = None) -> None:
        self._stored = second_moment  # or its lower triangle, after pack_
        self.total, self.count, self.shift = total, count, shift
        self._place: str | None = None

    def __repr__(self) -> str:
        place = f", packed in {self._place or 'memory'}" if self.is_packed else ""
        return f"Moments({tuple(self.total.shape)}, {self.total.dtype}, count={self.count}{place})"

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Moments:
        """Empty sums for rows of ``shape``, (features,) or (groups, features)."""
        second_moment = torch.zeros(*shape, shape[-1], dtype=dtype, device=device)
        return cls(second_moment, torch.zeros(shape, dtype=dtype, device=device))

    @property
    def is_packed(self) -> bool:
        """Whether only the lower triangle is stored; ``second_moment`` is then a new tensor each time."""
        return self._stored.dim() == self.total.dim()

    @property
    def second_moment(self) -> Tensor:
        return from_lower_triangle(self._stored, self.total.shape[-1]) if self.is_packed else self._stored

    @second_moment.setter
    def second_moment(self, value: Tensor) -> None:
        if self.is_packed:
            self._stored.copy_(lower_triangle(value))
        else:
            self._stored = value

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        found = {"second_moment": self._stored, "total": self.total}
        return found if self.shift is None else found | {"shift": self.shift}

    def pack_(self, place: str | None) -> None:
        """Store the lower triangle only: where it is (None), in the CPU's memory (``"cpu"``), or on the ``"disk"``.

        The file there is in the folder of temporary files (TMPDIR), and vanishes with these moments.

        Raises:
            OSError: the disk is full.
        """
        self._stored = self._stored if self.is_packed else lower_triangle(self._stored)
        if place is not None:
            self.to_cpu_()
        self._stored, self._place = _in_file(self._stored) if place == "disk" else self._stored, place

    def to_cpu_(self) -> None:
        """Move the sums to the CPU."""
        self._stored, self.total = self._stored.cpu(), self.total.cpu()
        self.shift = None if self.shift is None else self.shift.cpu()

    def to_float64_device_(self) -> None:
        """Move the sums to the CPU if their device has no float64."""
        if not has_float64(self.total.device):
            self.to_cpu_()

    def to_float64(self) -> Moments:
        """The same sums in float64: on the CPU if their device has none."""
        device = float64_device(self.total.device)
        shift = None if self.shift is None else self.shift.to(device).double()
        return Moments(self.second_moment.to(device).double(), self.total.to(device).double(), self.count, shift)

    def equals(self, other: Moments) -> bool:
        """Whether both hold the same sums, in the same form."""
        mine, others = self.tensors(), other.tensors()
        if self.count != other.count or mine.keys() != others.keys() or self.total.device != other.total.device:
            return False
        return all(torch.equal(mine[name], others[name]) for name in ("total", *mine))

    def with_count(self, count: int) -> Moments:
        """The same sums, of another number of rows."""
        other = copy.copy(self)
        other.count = count
        return other

    @property
    def offset(self) -> Tensor:
        """E[x - shift], float64; zero if there are no rows."""
        return self.total.double() / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        """E[x], float64; zero if there are no rows."""
        return self.offset if self.shift is None or not self.count else self.offset + self.shift.double()

    @property
    def mean_square(self) -> Tensor:
        """E[(x - shift)^2], float64: what the rounding of the sums is relative to."""
        return self._squares.double() / max(self.count, 1)

    @property
    def _squares(self) -> Tensor:
        if not self.is_packed:
            return self._stored.diagonal(dim1=-2, dim2=-1)
        rows = torch.arange(1, self.total.shape[-1] + 1, device=self._stored.device)
        return self._stored[..., rows * (rows + 1) // 2 - 1]

    @property
    def rounding(self) -> float:
        """Relative rounding error of the sums.

        At most n eps for n equal rows. The errors of sums over blocks of rows are of either sign: they grow with the
        square root of the number of blocks.
        """
        return min(torch.finfo(self.total.dtype).eps * min(self.count, max(84, self.count**0.5)), 1e-5)

    def moment(self, *, centered: bool) -> Tensor:
        """E[x x^T], about the mean if ``centered``, float64.

        A feature whose variance is below the rounding error of its squared offset is constant: its variance is 0.
        """
        moment = self.second_moment.double() / max(self.count, 1)
        if centered:
            _add_outer(moment, self.offset, -1)
            varies = moment.diagonal(dim1=-2, dim2=-1) > self.rounding * self.offset.square()
            if not bool(varies.all()):
                moment *= varies.unsqueeze(-1) & varies.unsqueeze(-2)
        elif self.shift is not None:
            _add_outer(moment, self.offset, -1)
            _add_outer(moment, self.mean, 1)
        return moment

    def about(self, shift: Tensor | None) -> Moments:
        """The same rows as sums about another shift; ``count`` must be the number of rows."""
        if _equal(shift, self.shift):
            return self
        shift = None if shift is None else shift.to(self.total.device)
        change = torch.zeros_like(self.total, dtype=torch.float64)
        change += 0 if self.shift is None else self.shift
        change -= 0 if shift is None else shift
        second_moment = self.second_moment.to(torch.float64, copy=True)
        _add_outer(second_moment, self.offset, -self.count)
        _add_outer(second_moment, self.offset + change, self.count)
        total = self.total.double() + self.count * change
        return Moments(second_moment.to(self.total.dtype), total.to(self.total.dtype), self.count, shift)

    def check(self) -> None:
        """Raise ValueError for what no rows have as their sums; the message has no subject."""
        stored, total, count = self._stored, self.total, self.count
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"has count {count!r}, which is not a number of rows")
        if stored.dtype != total.dtype or total.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"has a second_moment of {stored.dtype} and a total of {total.dtype}; both must be float64, or "
                "both float32"
            )
        features = total.shape[-1] if total.dim() in (1, 2) else -1
        if stored.shape not in ((*total.shape, features), (*total.shape[:-1], features * (features + 1) // 2)):
            raise ValueError(
                f"has a second_moment of shape {tuple(stored.shape)} and a total of {tuple(total.shape)}; they "
                "must be (features, features) and (features,), with groups before both"
            )
        for name, sums in self.tensors().items():
            if name == "shift" and (sums.shape != total.shape or not sums.is_floating_point()):
                raise ValueError(
                    f"has a shift of shape {tuple(sums.shape)} and {sums.dtype}; it must be a float tensor of shape "
                    f"{tuple(total.shape)}"
                )
            if not all_finite(sums):
                raise ValueError(f"has NaN or inf in its {name}")
        if bool((self._squares < 0).any()):
            raise ValueError("has a negative sum of squares in its second_moment")

    def plus(self, other: Moments) -> Moments:
        """The sums over the rows of both, in the dtype of this one."""
        shift = _common_shift([self, other])
        mine, others = self.about(shift), other.about(shift)
        second_moment = mine.second_moment + others.second_moment.to(self.total)
        found = Moments(second_moment, mine.total + others.total.to(self.total), self.count + other.count, shift)
        if self.is_packed:
            found.pack_(self._place)
        return found


def _add_outer(matrices: Tensor, rows: Tensor, alpha: float) -> None:
    """Add alpha x x^T of each row x to each matrix, in place."""
    for matrix, row in [(matrices, rows)] if rows.dim() == 1 else zip(matrices, rows, strict=True):
        matrix.addr_(row, row, alpha=alpha)


def _in_file(tensor: Tensor) -> Tensor:
    """A copy in a file that is mapped into memory, and has no name where the system allows that."""
    if not tensor.numel():
        return tensor
    handle, name = tempfile.mkstemp(prefix="lowrank_ops_", suffix=".sums")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, tensor.nbytes)  # a full disk is an error here, and a crash in the mapping
        mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        return mapped.copy_(tensor)
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            os.unlink(name)


def lower_triangle(matrices: Tensor) -> Tensor:
    """The lower triangles of (..., n, n), row by row, (..., n (n + 1) / 2)."""
    rows = [matrices[..., i, : i + 1] for i in range(matrices.shape[-1])]
    return torch.cat(rows, -1) if rows else matrices.flatten(-2)


def from_lower_triangle(packed: Tensor, n: int) -> Tensor:
    """The symmetric matrices (..., n, n) of :func:`lower_triangle`.

    Raises:
        ValueError: ``packed`` has another size.
    """
    if packed.dim() == 0 or packed.shape[-1] != n * (n + 1) // 2:
        raise ValueError(
            f"a second_moment has shape {tuple(packed.shape)}, not (..., {n * (n + 1) // 2}), the lower triangle of "
            f"{n} features"
        )
    matrices = packed.new_empty(*packed.shape[:-1], n, n)
    for i, row in enumerate(packed.split(list(range(1, n + 1)), -1)):
        matrices[..., i, : i + 1] = row
    return covariance_finalize_(matrices)


def _equal(shift: Tensor | None, other: Tensor | None) -> bool:
    if shift is None or other is None:
        return shift is other
    return shift.dtype == other.dtype and torch.equal(shift, other.to(shift.device))


def _common_shift(parts: list[Moments]) -> Tensor | None:
    """The mean of the shifts by rows, or the shift that all parts have."""
    if all(_equal(part.shift, parts[0].shift) for part in parts):
        return parts[0].shift
    rows = max(sum(part.count for part in parts), 1)
    common = torch.zeros_like(parts[0].total, dtype=torch.float64)
    for part in parts:
        if part.shift is not None:
            common += part.shift.to(common) * (part.count / rows)
    return common


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
        return {name: moments.total.dtype for name, moments in self.moments().items()}

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
        return sum(tensor.nbytes for moments in self._distinct() for tensor in moments.tensors().values())

    def share_equal_(self, earlier: Iterable[Covariances]) -> None:
        """Let inputs that earlier statistics hold as well share their moments with these."""
        known = [layer.activations for part in earlier for layer in part.values() if layer.side == "input"]
        for fqn, layer in self.items():
            if layer.side == "input":
                same = next((one for one in known if one.equals(layer.activations)), layer.activations)
                self._layers[fqn] = replace(layer, activations=same)

    def pack_(self, place: str | None) -> None:
        """:meth:`Moments.pack_` for all moments, one after another."""
        for moments in self._distinct():
            moments.pack_(place)

    @checked()
    def merge(self, other: Covariances) -> Covariances:
        """The statistics of both, as if one run had seen all rows; a layer that one never reached has no rows there.

        Raises:
            ValueError: the two are of other layers, sides or shapes, or only one has output gradients.
        """
        parts, mine = [self._distinct(), other._distinct()], [self._contents(), other._contents()]
        try:
            union = _Union(mine)
        except ValueError as error:
            raise ValueError(
                f"other and this one {error}. Calibrate both with the same model, filter_fn, side, sensitivity and "
                "token_weights."
            ) from None
        merged = {}
        for key, count in union.counts.items():
            found = [part[index] for part, index in zip(parts, key.indices, strict=True) if index is not None]
            total = found[0] if len(found) == 1 else found[0].plus(found[1])
            merged[key] = total.with_count(count)
        return Covariances(union.layers(merged), union.unreached, self.skipped)

    def all_reduce_(self, group: torch.distributed.ProcessGroup | None = None) -> Covariances:
        """Sum over the processes of ``torch.distributed``, in place; every process ends with the whole.

        The processes may have different numbers of batches, and a layer that one of them never reached has no rows
        there. A process in which :func:`lowrank_ops.calibrate` or a ``Calibrator`` fails ends the wait of the others.

        Raises:
            RuntimeError: calibration failed in another process, which is named; raised in every process.
            ValueError: the processes hold other layers, sides or shapes, sums of different dtypes, or output gradients
                in some processes only; raised in every process, before any sum is changed.
        """
        wait_for_all(group)
        contents: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(contents, self._contents(), group=group)
        try:
            union = _Union(contents, same_dtype=True)
        except ValueError as error:
            raise ValueError(
                f"all_reduce_: the processes {error}. Calibrate every process with the same arguments."
            ) from None
        distinct, rank = self._distinct(), torch.distributed.get_rank(group)
        device = distinct[0].total.device if distinct else _device_of(group)
        reduced: dict[_Key, Moments] = {}
        used: set[int] = set()
        for key, count in union.counts.items():
            index = key.indices[rank]
            if index is None:
                mine = Moments.zeros(*union.shape_and_dtype(key), device)
            else:
                mine = copy.deepcopy(distinct[index]) if index in used else distinct[index]
                used.add(index)
            if union.is_shifted(key):
                common = torch.zeros_like(mine.total, dtype=torch.float64)
                if mine.shift is not None:
                    common += mine.shift.double() * (mine.count / max(count, 1))
                torch.distributed.all_reduce(common, group=group)
                about = mine.about(common)
                mine.second_moment, mine.total, mine.shift = about.second_moment, about.total, about.shift
            second_moment = mine.second_moment
            for tensor in (second_moment, mine.total):
                torch.distributed.all_reduce(tensor, group=group)
            mine.second_moment, mine.count = second_moment, count
            reduced[key] = mine
        self._layers, self.unreached = union.layers(reduced), union.unreached
        return self

    @checked()
    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the whole file, or on an exception nothing.

        Raises:
            OSError: the file cannot be written.
        """
        distinct = self._distinct()
        index = {id(moments): i for i, moments in enumerate(distinct)}
        tensors: dict[str, Tensor] = {}
        for i, moments in enumerate(distinct):
            tensors |= {f"{i}.{name}": tensor for name, tensor in moments.tensors().items()}
            if not moments.is_packed:
                tensors[f"{i}.second_moment"] = lower_triangle(moments.second_moment)
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
    def load(cls, path: str | Path, *, verify: bool = True, packed: bool = False) -> Covariances:
        """Read what :meth:`save` wrote, by this version or an earlier one.

        Args:
            path: of the file.
            verify: compare the tensors with their checksums, which reads every byte; version 1 has none.
            packed: leave the second moments in the file, as lower triangles that are read when they are needed: for
                files that are larger than the memory. Files of versions 1 and 2 hold none, and are read as a whole.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, was not written by :meth:`save`, or holds sums that no rows have.
        """
        try:
            with open_tensors(path) as file:
                header = read_header(file, verify=verify)
                checksums = None
                form = header["format"]
                if form not in (_FORMAT, _FORMAT_2, _FORMAT_1):
                    raise ValueError(f"its format is {form!r}, this version reads {_FORMAT!r} and earlier ones")
                if form == _FORMAT_1:
                    header = _from_format_1(header)
                elif verify:
                    checksums = header["checksums"]
                _check_header(header)
                moments = []
                for i, count in enumerate(header["counts"]):
                    names = [
                        "second_moment",
                        "total",
                        *(["shift"] if f"{i}.shift" in header.get("checksums", {}) else []),
                    ]
                    read = {name: read_tensor(file, f"{i}.{name}", checksums) for name in names}
                    if form == _FORMAT and not packed:
                        read["second_moment"] = from_lower_triangle(read["second_moment"], read["total"].shape[-1])
                    moments.append(Moments(**read, count=count))
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

    def _contents(self) -> _Contents:
        """What is held, without the sums."""
        distinct = self._distinct()
        index = {id(moments): i for i, moments in enumerate(distinct)}
        return _Contents(
            {
                fqn: (layer.side, {name: index[id(part)] for name, part in layer.moments().items()})
                for fqn, layer in self.items()
            },
            [(tuple(part.total.shape), part.total.dtype, part.count, part.shift is not None) for part in distinct],
            self.unreached,
            next((layer.output_gradients.count for layer in self.values() if layer.output_gradients is not None), None),
            self.has_token_weights,
        )


class _Contents(NamedTuple):
    """What one :class:`Covariances` holds, without the sums."""

    layers: dict[str, tuple[str, dict[str, int]]]  # side, and the index of each field's moments
    moments: list[tuple[tuple[int, ...], torch.dtype, int, bool]]  # shape of the total, dtype, count, has a shift
    unreached: tuple[str, ...]
    samples: int | None  # of the output gradients; None without
    token_weights: bool


class _Key(NamedTuple):
    """Moments that are summed."""

    field: str
    indices: tuple[int | None, ...]  # in each part


class _Union:
    """The layers of several parts of a calibration, and which of their moments are to be summed.

    Moments that are shared in every part stay shared. Output gradients are counted in samples, in all of which a layer
    that is not reached has the gradient 0.

    Raises:
        ValueError: the parts do not fit together; the message has no subject.
    """

    def __init__(self, parts: Sequence[_Contents], same_dtype: bool = False) -> None:
        self._parts = parts
        self._keys: dict[str, tuple[str, dict[str, _Key]]] = {}
        self.counts: dict[_Key, int] = {}
        for what in ("samples", "token_weights"):
            if len({getattr(part, what) in (None, False) for part in parts if part.layers}) > 1:
                name = "output gradients" if what == "samples" else "token weights"
                raise ValueError(f"must all hold {name}, or none; some do")
        samples = sum(part.samples or 0 for part in parts)
        wrong = []
        for fqn in _merged_order([list(part.layers) for part in parts]):
            found = [part.layers[fqn] for part in parts if fqn in part.layers]
            known = all(fqn in part.layers or fqn in part.unreached for part in parts)
            fields = [name for name in _MOMENTS if any(name in indices for _, indices in found)]
            keys = {
                name: _Key(name, tuple(part.layers.get(fqn, ("", {}))[1].get(name) for part in parts))
                for name in fields
            }
            kinds = [self._kinds(key, same_dtype) for key in keys.values()]
            if not known or len({side for side, _ in found}) > 1 or any(len(kind) > 1 for kind in kinds):
                wrong.append(fqn)
                continue
            self._keys[fqn] = (found[0][0], keys)
            for name, key in keys.items():
                rows = sum(parts[i].moments[index][2] for i, index in enumerate(key.indices) if index is not None)
                self.counts[key] = samples if name == "output_gradients" else rows
        if wrong:
            dtypes = ", dtypes" if same_dtype else ""
            raise ValueError(f"must hold the same layers, sides, shapes{dtypes}; they differ at {', '.join(wrong)}")
        reached = self._keys.keys()
        self.unreached = tuple(
            fqn for fqn in _merged_order([list(part.unreached) for part in parts]) if fqn not in reached
        )

    def _kinds(self, key: _Key, same_dtype: bool) -> set[Any]:
        found = [part.moments[index] for part, index in zip(self._parts, key.indices, strict=True) if index is not None]
        return {(shape, dtype if same_dtype else None) for shape, dtype, *_ in found}

    def shape_and_dtype(self, key: _Key) -> tuple[tuple[int, ...], torch.dtype]:
        """Of the total of summed moments."""
        part, index = next((part, i) for part, i in zip(self._parts, key.indices, strict=True) if i is not None)
        shape, dtype, *_ = part.moments[index]
        return shape, dtype

    def is_shifted(self, key: _Key) -> bool:
        """Whether the sums of some part are about a shift."""
        indexed = zip(self._parts, key.indices, strict=True)
        return any(part.moments[index][3] for part, index in indexed if index is not None)

    def layers(self, moments: Mapping[_Key, Moments]) -> dict[str, LayerStatistics]:
        """The statistics of every layer, from the summed moments."""
        return {
            fqn: LayerStatistics(side, **{name: moments[key] for name, key in keys.items()})
            for fqn, (side, keys) in self._keys.items()
        }


def _merged_order(orders: Sequence[Sequence[str]]) -> list[str]:
    """All names, each behind the one that it follows in its own order."""
    merged = list(orders[0])
    for order in orders[1:]:
        known = set(merged)
        for before, name in zip([None, *order], order, strict=False):
            if name not in known:
                merged.insert(0 if before is None else merged.index(before) + 1, name)
    return merged


def _device_of(group: torch.distributed.ProcessGroup | None) -> torch.device:
    cuda = "nccl" in torch.distributed.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


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
