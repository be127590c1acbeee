"""The checkpoint of a reconstruction: the finished factors, and what must be equal for the run to resume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..factors.projections import Factors
from ..files import check_file, digest, digests, open_checkpoint, replacing, write_tensors
from ..models.layers import bias_vector, weight_matrix

_FORMAT = "lowrank_ops.reconstruction/3"
_TENSORS = ("down", "up", "bias", "kept")  # of Factors


def run_identity(
    layers: Mapping[str, nn.Module],
    factors: Mapping[str, Factors],
    batches: Sequence[Any],
    settings: Any,
    **others: Any,
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be resumed; ``settings`` are those of either reconstruction."""
    weights = {fqn: (weight_matrix(layer), bias_vector(layer)) for fqn, layer in layers.items()}
    return {
        "ranks": {fqn: part.rank for fqn, part in factors.items()},
        "projections": {fqn: part.projection for fqn, part in factors.items()},
        "batches": [digest(batch) for batch in batches],
        "weights": digest(weights),
        "sensitivity": digest(settings.sensitivity) if callable(settings.sensitivity) else settings.sensitivity,
        "mask": digest([settings.mask, settings.unmasked_rows]),
        "forward": digest(settings.forward),
        **others,
    }


def save_checkpoint(path: Path, identity: dict[str, Any], done: Mapping[str, Factors]) -> None:
    """Write the factors fitted so far; a crash leaves the old file or the new one."""
    tensors: dict[str, Tensor] = {}
    entries = {}
    for fqn, part in done.items():
        tensors |= {f"{fqn}.{name}": value for name in _TENSORS if (value := getattr(part, name)) is not None}
        entries[fqn] = {field.name: getattr(part, field.name) for field in fields(part) if field.name not in _TENSORS}
    header = {"format": _FORMAT, "settings": identity, "layers": entries, "checksums": digests(tensors)}
    with replacing(path) as (file,):
        write_tensors(file, tensors, header)


def resume_checkpoint(path: Path, identity: dict[str, Any], layers: Mapping[str, nn.Module]) -> dict[str, Factors]:
    """The factors that a checkpoint holds; none if it does not exist.

    Raises:
        ValueError: the file cannot be read, or is of another run.
    """
    check_file("checkpoint", path)
    if not path.exists():
        return {}
    with open_checkpoint(path, _FORMAT) as (header, tensors):
        settings = dict(header["settings"])
        done = {fqn: _stored(fqn, entry, tensors) for fqn, entry in header["layers"].items()}
    differ = [name for name, value in identity.items() if settings.get(name) != value]
    if differ:
        raise ValueError(
            f"checkpoint {str(path)!r} is of another run: its {', '.join(differ)} differ. Use the same arguments to "
            "resume it, or delete it to start again."
        )
    for fqn, part in done.items():
        if fqn not in layers or not _fits(part, identity["ranks"][fqn], layers[fqn]):
            raise ValueError(
                f"checkpoint {str(path)!r} is damaged: its factors of {fqn!r} do not fit the layer. Delete it to start "
                "again."
            )
    return done


def _stored(fqn: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Factors:
    part = Factors(**{name: tensors.get(f"{fqn}.{name}") for name in _TENSORS}, **entry)  # type: ignore[arg-type]
    if part.kept is not None and part.kept.shape != (part.rank,):
        raise ValueError(f"the channels of {fqn!r} are not as many as it says")
    for value in (part.down, part.up, *([] if part.bias is None else [part.bias])):
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"the factors of {fqn!r} are not finite numbers")
    if not isinstance(part.output_variance, float) or not isinstance(part.predicted_error, (float, type(None))):
        raise ValueError(f"the errors of {fqn!r} are not numbers")
    return part


def _fits(part: Factors, rank: int, layer: nn.Module) -> bool:
    *groups, out_features, in_features = weight_matrix(layer).shape
    shapes = [((*groups, part.rank, in_features), (*groups, out_features, part.rank))]
    if part.kept is not None:  # rows of the weight, or columns
        shapes = [((n, m), (n, 0)) for n, m in ((part.rank, in_features), (out_features, part.rank))]
        out_features = len(part.down)
    bias = part.bias is None or part.bias.shape == (math.prod(groups) * out_features,)
    return part.rank == rank and (part.down.shape, part.up.shape) in shapes and bias
