"""What calibration measures of one layer: moments of its activations and of its output gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..models.layers import all_finite
from ..models.running import float64_device, has_float64
from .packing import empty_in_file, from_lower_triangle, lower_triangle

SIDES = ("input", "output")


class NonFiniteActivationError(ValueError):
    """NaN or inf in an activation or a gradient during calibration; the message names the layer and the batch."""


class Moments:
    """First and second moments of rows, as sums about a shift.

    If the mean of a feature is large relative to its standard deviation, sums about zero would lose the deviation to
    rounding. :attr:`mean` and :meth:`moment` do not depend on the shift.

    Attributes:
        second_moment: sum of (x - shift) (x - shift)^T, (features, features), or (groups, features, features) for
            grouped convolutions.
        total: sum of x - shift, (features,) or (groups, features).
        count: number of rows.
        shift: of the shape of ``total``, any float dtype; None is zero.
    """

    shift: Tensor | None = None

    def __init__(
        self,
        second_moment: Tensor,
        total: Tensor,
        count: int = 0,
        shift: Tensor | None = None,
        *,
        place: str | None = None,
    ) -> None:
        self._stored = second_moment  # or its lower triangle, after pack_
        self.total, self.count, self.shift, self._place = total, count, shift, place

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

    def divided(self, divisor: float | Tensor) -> Tensor:
        """The second moment divided by a number, or one for each group (groups, 1, 1): a new tensor, float64."""
        moment = self.second_moment.double()
        return moment.div_(divisor) if self.is_packed else moment / divisor  # unpacked ones are new already

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        found = {"second_moment": self._stored, "total": self.total}
        return found if self.shift is None else found | {"shift": self.shift}

    def pack_(self, place: str | None) -> None:
        """Store only the lower triangle: on its device (None), in the CPU's memory (``"cpu"``), or on the ``"disk"``.

        On the disk it is in a temporary file (in TMPDIR), which is deleted with these moments.

        Raises:
            OSError: the disk is full.
        """
        self._stored, self._place = self.packed(place), place
        if place is not None:
            self.to_cpu_()

    def packed(self, place: str | None) -> Tensor:
        """The lower triangle of the second moment at a ``place``, as for :meth:`pack_`."""
        stored, n = self._stored, self.total.shape[-1]
        device = stored.device if place is None else torch.device("cpu")
        if self.is_packed and stored.device == device and place != "disk":
            return stored
        shape = (*self.total.shape[:-1], n * (n + 1) // 2)
        out = empty_in_file(shape, stored.dtype) if place == "disk" else stored.new_empty(shape, device=device)
        return out.copy_(stored) if self.is_packed else lower_triangle(stored, out)

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

    def copied(self) -> Moments:
        """The same sums at the same place, in memory or a file of their own."""
        stored = self.packed("disk") if self._place == "disk" else self._stored.clone()
        return Moments(stored, self.total.clone(), self.count, self.shift, place=self._place)

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
        return self._stored[..., self._packed_diagonal]

    @property
    def _packed_diagonal(self) -> Tensor:
        rows = torch.arange(1, self.total.shape[-1] + 1, device=self._stored.device)
        return rows * (rows + 1) // 2 - 1

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
        moment = self.divided(max(self.count, 1))
        if centered:
            _add_outer(moment, self.offset, -1)
            varies = moment.diagonal(dim1=-2, dim2=-1) > self.rounding * self.offset.square()
            if not bool(varies.all()):
                moment *= varies.unsqueeze(-1) & varies.unsqueeze(-2)
        elif self.shift is not None:
            _add_outer(moment, self.offset, -1)
            _add_outer(moment, self.mean, 1)
        return moment

    def damped(self, share: float, *, centered: bool) -> Moments:
        """The same moments with independent noise on every feature.

        The variance of the noise is ``share`` of the mean variance of the features, or of their mean square if not
        ``centered``.
        """
        squares = self._squares.double()
        if centered:
            squares = (squares - max(self.count, 1) * self.offset.square()).clamp_min(0)
        found = self.copied()
        stored = found._stored
        noise = (share * squares.mean(-1, keepdim=True)).to(stored.dtype)
        if self.is_packed:
            stored[..., self._packed_diagonal] += noise
        else:
            stored.diagonal(dim1=-2, dim2=-1).add_(noise)
        return found

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
        """Raise ValueError for values that cannot be sums of rows; the message lacks the subject."""
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
        found = {name: getattr(self, name) for name in MOMENTS}
        return {name: moments for name, moments in found.items() if moments is not None}

    def dtypes(self) -> dict[str, torch.dtype]:
        """``{field: dtype of its sums}``."""
        return {name: moments.total.dtype for name, moments in self.moments().items()}

    def check(self) -> None:
        """Raise ValueError for values that cannot be sums of rows; the message begins with the field."""
        if self.side not in SIDES:
            raise ValueError(f"side is {self.side!r}, not one of {', '.join(map(repr, SIDES))}")
        for name, moments in self.moments().items():
            try:
                moments.check()
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None


MOMENTS = tuple(field.name for field in fields(LayerStatistics) if field.name != "side")


def numbered(layers: Mapping[str, LayerStatistics]) -> tuple[list[Moments], dict[str, dict[str, int]]]:
    """All moments, each shared one once, and ``{fqn: {field: index among them}}``."""
    distinct = list({id(part): part for layer in layers.values() for part in layer.moments().values()}.values())
    index = {id(moments): i for i, moments in enumerate(distinct)}
    return distinct, {
        fqn: {name: index[id(part)] for name, part in layer.moments().items()} for fqn, layer in layers.items()
    }
