"""The file format of covariances: one safetensors file with lower triangles; versions 1 and 2 can be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import digests, open_tensors, read_header, read_tensor, replacing, write_tensors
from .packing import from_lower_triangle, lower_triangle
from .statistics import MOMENTS, SIDES, LayerStatistics, Moments, numbered

_FORMAT = "lowrank_ops.covariances/3"
_FORMAT_1, _FORMAT_2 = "lowrank_ops.covariances/1", "lowrank_ops.covariances/2"


def write_covariances(
    path: Path, layers: Mapping[str, LayerStatistics], unreached: tuple[str, ...], skipped: Mapping[str, str]
) -> None:
    """Write the file; :func:`read_covariances` reads it.

    Raises:
        OSError: the file cannot be written.
    """
    distinct, indices = numbered(layers)
    tensors: dict[str, Tensor] = {}
    for i, moments in enumerate(distinct):
        tensors |= {f"{i}.{name}": tensor for name, tensor in moments.tensors().items()}
        if not moments.is_packed:
            tensors[f"{i}.second_moment"] = lower_triangle(moments.second_moment)
    header = {
        "format": _FORMAT,
        "counts": [moments.count for moments in distinct],
        "layers": {fqn: {"side": layer.side} | indices[fqn] for fqn, layer in layers.items()},
        "unreached": unreached,
        "skipped": skipped,
        "checksums": digests(tensors),
    }
    with replacing(path) as (file,):
        write_tensors(file, tensors, header)


def read_covariances(
    path: str | Path, verify: bool, packed: bool = False
) -> tuple[dict[str, LayerStatistics], tuple[str, ...], dict[str, str]]:
    """The layers, the unreached and the skipped ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is of another kind, or holds values that cannot be sums of rows.
    """
    try:
        with open_tensors(path) as file:
            header = read_header(file, verify=verify)
            checksums = None
            version = header["format"]
            if version not in (_FORMAT, _FORMAT_2, _FORMAT_1):
                raise ValueError(f"its format is {version!r}, this version reads {_FORMAT!r} and earlier ones")
            if version == _FORMAT_1:
                header = _from_format_1(header)
            elif verify:
                checksums = header["checksums"]
            _check_header(header)
            moments = []
            for i, count in enumerate(header["counts"]):
                names = ["second_moment", "total"]
                names += ["shift"] if f"{i}.shift" in header.get("checksums", {}) else []
                read = {name: read_tensor(file, f"{i}.{name}", checksums) for name in names}
                if version == _FORMAT and not packed:
                    read["second_moment"] = from_lower_triangle(read["second_moment"], read["total"].shape[-1])
                moments.append(Moments(**read, count=count, place="disk" if packed and version == _FORMAT else None))
        layers = {
            fqn: LayerStatistics(entry["side"], **{name: moments[entry[name]] for name in MOMENTS if name in entry})
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
    return layers, tuple(header["unreached"]), header["skipped"]


def _check_header(header: Mapping[str, Any]) -> None:
    """Raise ValueError for a header that :meth:`Covariances.save` does not write."""
    counts, layers = header["counts"], header["layers"]
    if not isinstance(counts, list) or not isinstance(layers, dict):
        raise ValueError("its 'counts' or 'layers' has the wrong type")
    for fqn, entry in layers.items():
        if not isinstance(entry, dict) or set(entry) - {"side", *MOMENTS} or not {"side", "activations"} <= set(entry):
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
