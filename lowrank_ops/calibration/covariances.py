"""The statistics of all layers of a model: saved, merged, and summed over processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..arguments import checked
from ..models.running import shortened
from .covariance_file import read_covariances, write_covariances
from .distributed import wait_for_all
from .statistics import LayerStatistics, Moments, numbered
from .union import Contents, Key, Union


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
        """Input moments that equal those of earlier statistics become the same objects, so that they are held once."""
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
    def damped(self, inputs: float, output_gradients: float | None = None) -> Covariances:
        """The same statistics as if inputs and output gradients had independent noise on every feature.

        In a compressed model, the errors of earlier layers change the input of a layer in directions in which
        calibration saw almost no variance. Texts of another kind do so too. Ranks and factors from damped statistics
        preserve these directions. In return, errors on the calibration rows are larger, and reports include the noise
        in the errors that they predict. Apply it once, to the sum of all batches, and after
        :func:`lowrank_ops.recalibrate`. The damping is that of K-FAC (Martens & Grosse 2015, arXiv 1503.05671).

        Args:
            inputs: variance of the noise relative to the mean variance of the features of each layer's input; 0.1 for
                language models.
            output_gradients: the same for output gradients, relative to their mean square; None is half of ``inputs``.

        Raises:
            ValueError: a negative number or infinity; layers whose output was streamed instead of the input.

        Example:
            >>> import torch, lowrank_ops as lro
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
            >>> covariances = lro.calibrate(model, [torch.randn(32, 8)]).damped(0.1)
        """
        shares = {"activations": inputs, "token_weighted": inputs}
        shares["output_gradients"] = inputs / 2 if output_gradients is None else output_gradients
        for name, value in (("inputs", inputs), ("output_gradients", shares["output_gradients"])):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0; got {value!r}.")
        streamed = [fqn for fqn, layer in self.items() if layer.side == "output"]
        if streamed:
            raise ValueError(
                "calibration recorded only the outputs of these layers, so the effect of noise on their inputs is "
                f'unknown: {shortened(streamed)}. Calibrate with side="input".'
            )
        done: dict[int, Moments] = {}  # layers that share moments keep sharing them
        layers = {}
        for fqn, layer in self.items():
            for name, moments in layer.moments().items():
                if id(moments) not in done:
                    done[id(moments)] = moments.damped(shares[name], centered=name != "output_gradients")
            changed: dict[str, Any] = {name: done[id(moments)] for name, moments in layer.moments().items()}
            layers[fqn] = replace(layer, **changed)
        return Covariances(layers, self.unreached, self.skipped)

    @checked()
    def merge(self, other: Covariances) -> Covariances:
        """The statistics of both together, as from one run over all rows; a layer may be unreached in one of them.

        Raises:
            ValueError: the two are of other layers, sides or shapes, or only one has output gradients.
        """
        parts, mine = [self._distinct(), other._distinct()], [self._contents(), other._contents()]
        try:
            union = Union(mine)
        except ValueError as error:
            raise ValueError(
                f"other and this one {error}. Calibrate both with the same model, filter_fn, side, sensitivity and "
                "token_weights."
            ) from None
        merged = {}
        for key, count in union.counts.items():
            found = [part[index] for part, index in zip(parts, key.indices, strict=True) if index is not None]
            total = found[0].copied() if len(found) == 1 else found[0].plus(found[1])
            merged[key] = total.with_count(count)
        return Covariances(union.layers(merged), union.unreached, self.skipped)

    def all_reduce_(self, group: torch.distributed.ProcessGroup | None = None) -> Covariances:
        """Sum over the processes of ``torch.distributed``, in place; afterwards every process holds the sum of all.

        The processes may have different numbers of batches, and a layer may be unreached in some of them. If
        :func:`lowrank_ops.calibrate` or a ``Calibrator`` fails in one process, the others raise instead of waiting.

        Raises:
            RuntimeError: calibration failed in another process, which is named; raised in every process.
            ValueError: the processes hold other layers, sides or shapes, sums of different dtypes, or output gradients
                in some processes only; raised in every process, before any sum is changed.
        """
        wait_for_all(group)
        contents: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(contents, self._contents(), group=group)
        try:
            union = Union(contents, same_dtype=True)
        except ValueError as error:
            raise ValueError(
                f"all_reduce_: the processes {error}. Calibrate every process with the same arguments."
            ) from None
        distinct, rank = self._distinct(), torch.distributed.get_rank(group)
        device = distinct[0].total.device if distinct else _device_of(group)
        reduced: dict[Key, Moments] = {}
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
        """Write one safetensors file; on an exception, none is written and an old one stays.

        Raises:
            OSError: the file cannot be written.
        """
        write_covariances(Path(path), self._layers, self.unreached, self.skipped)

    @classmethod
    @checked()
    def load(cls, path: str | Path, *, verify: bool = True, packed: bool = False) -> Covariances:
        """Read a file that :meth:`save` of this version or an earlier one wrote.

        Args:
            path: of the file.
            verify: compare the tensors with their checksums, which reads every byte; version 1 has none.
            packed: leave the second moments in the file, as lower triangles that are read when they are needed, for
                files that are larger than the memory. Files of versions 1 and 2 hold none and are read as a whole.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or of another kind, or holds values that cannot be sums of rows.
        """
        return cls(*read_covariances(path, verify, packed))

    def _distinct(self) -> list[Moments]:
        """All moments, each once, in an order that equal layouts share."""
        return numbered(self._layers)[0]

    def _contents(self) -> Contents:
        return Contents.of(self._layers, self.unreached)


def _device_of(group: torch.distributed.ProcessGroup | None) -> torch.device:
    cuda = "nccl" in torch.distributed.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
