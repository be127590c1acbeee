"""The replaced layers of a model as plain JSON types, and the same layers, empty, for another copy of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .factors.eight_bit import DTYPES
from .layers import EightBitLinear, LowRankLayer, LowRankLinear, NarrowLinear, PivotedLinear
from .layers.conv import GEOMETRY, LowRankConv
from .layers.group import group_layers, groups_in
from .layers.replace import lowrank_type
from .models.layers import dimensions, find_layers, has_hooks, is_conv, tied_layers
from .report import CompressionReport

CONFIG_FILE = "lowrank_config.json"
FORMAT = "lowrank_ops.checkpoint"
FORMAT_VERSION = 5  # 1 has no checksums; 2 is written without pivoted layers, 3 without 8 bits, 4 without narrow layers
COPY_AGAIN = "Copy or save the checkpoint again."
OTHER_MODEL = "Pass the architecture that was compressed."


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded. The message gives the reason; the model is unchanged."""


def describe_layers(model: nn.Module, report: CompressionReport | None = None) -> dict[str, Any]:
    """Format, version and ``layers``, as plain JSON types: per replaced layer its kind, rank, bias and sizes.

    Raises:
        ValueError: ``report`` is of another model.
    """
    rows = {} if report is None else {row.fqn: row for row in report.layers if row.is_replaced}
    groups = {fqn: {"group": i} for i, names in enumerate(groups_in(model)) for fqn in names}
    entries = {
        fqn: {
            **_sizes(module),
            **({"narrow": _features(module)} if isinstance(module, NarrowLinear) else {"rank": module.rank}),
            "bias": module.bias is not None,
            "calibration_rows": rows[fqn].rows if fqn in rows else None,
            **groups.get(fqn, {}),
        }
        for fqn, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (LowRankLayer, NarrowLinear))
    }
    for fqn, row in rows.items():
        entry = entries.get(fqn, {})
        if row.channels is None and row.rank is not None:
            fits, size = row.rank == entry.get("rank"), f"at rank {row.rank}"
        elif row.channels is not None:
            fits, size = row.channels in entry.get("narrow", ()), f"with {row.channels} channels"
        else:
            fits, size = bool(entry), "with an 8-bit weight"
        if not fits:
            raise ValueError(
                f"report does not describe model: it has layer {fqn!r} {size}, and model does not. Pass "
                "the report that compress_ returned for this model, or none."
            )
    for fqn, entry in entries.items():
        layer = model.get_submodule(fqn)
        if isinstance(layer, LowRankLinear) and any(layer.formats):
            entry |= {"formats": list(layer.formats), "dtype": str(layer.dtype).removeprefix("torch.")}
    keys = {key for entry in entries.values() for key in entry}
    version = FORMAT_VERSION if "narrow" in keys else 4 if "formats" in keys else 3 if "pivoted" in keys else 2
    return {"format": FORMAT, "version": version, "layers": entries}


def _sizes(layer: nn.Module) -> dict[str, Any]:
    """Kind and sizes of a dense layer, or of the dense layer that ``layer`` replaced, as plain JSON types."""
    if is_conv(layer) or isinstance(layer, LowRankConv):
        values = {name: getattr(layer, name) for name in GEOMETRY}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"kind": f"conv{len(layer.kernel_size)}d", **plain}
    pivoted = {"pivoted": True} if isinstance(layer, PivotedLinear) else {}
    if isinstance(layer, LowRankLinear):
        in_features, out_features = layer.in_features, layer.out_features
    elif isinstance(layer, NarrowLinear):
        in_features, out_features = layer.dense_features
    else:
        _, in_features, out_features = dimensions(layer)
    return {"kind": "linear", "in_features": in_features, "out_features": out_features, **pivoted}


def _features(layer: nn.Linear) -> list[int]:
    return [layer.in_features, layer.out_features]


def check_format(file: str, config: Mapping[str, Any]) -> None:
    """Refuse what :func:`describe_layers` of this or an earlier version has not written.

    Raises:
        CheckpointError: another format, a newer version, or ``layers`` of another type.
    """
    version = config.get("version")
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{file!r} was not written by save_pretrained: its format is not {FORMAT!r}.")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{file!r} has format version {version!r}; this lowrank_ops reads versions 1 to {FORMAT_VERSION}. "
            "Update lowrank_ops, or save the checkpoint again with this version."
        )
    check_field(file, config, "layers", dict)


def check_field(file: str, config: Mapping[str, Any], field: str, kind: type) -> None:
    """Raise CheckpointError unless a field is a mapping to values of this type."""
    values = config.get(field)
    if not isinstance(values, dict) or not all(isinstance(value, kind) for value in values.values()):
        raise CheckpointError(f"{file!r} is damaged: {field!r} has the wrong type. {COPY_AGAIN}")


def empty_layers(model: nn.Module, entries: Mapping[str, Mapping[str, Any]]) -> dict[nn.Module, nn.Module]:
    """``{dense layer: its replacement with uninitialized values}`` for the ``layers`` of a description.

    Raises:
        CheckpointError: a layer that ``model`` does not have, or has in another form.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for fqn, module in modules.items():
        if isinstance(module, (LowRankLayer, NarrowLinear)):
            raise CheckpointError(
                f"dense_model is already compressed: {fqn or 'the model'} is a {type(module).__name__}. Build the "
                "original architecture and load into that."
            )
    found, skipped = find_layers(model)
    compressible, tied = set(found.values()), tied_layers(model)
    layers: dict[nn.Module, nn.Module] = {}
    for fqn, entry in entries.items():
        dense = modules.get(fqn)
        if dense is None or dense not in compressible:
            problem = (
                "has no module of that name" if dense is None else f"has a module of type {type(dense).__name__} there"
            )
            reason = f" ({skipped[fqn]})" if fqn in skipped else ""
            raise CheckpointError(
                f"the checkpoint has a low-rank {entry.get('kind')} layer {fqn!r}, but dense_model {problem}{reason}. "
                f"{OTHER_MODEL}"
            )
        if fqn in tied:
            raise CheckpointError(
                f"dense_model ties the weight of layer {fqn!r} to {tied[fqn]!r}, but the checkpoint has factors "
                "instead. Untie the two, as before the compression."
            )
        if has_hooks(dense):
            raise CheckpointError(
                f"layer {fqn!r} of dense_model has hooks, which its replacement would drop; remove them first."
            )
        layers[dense] = _empty_layer(fqn, dense, entry)
    _group(entries, {fqn: layers[module] for fqn, module in modules.items() if fqn in entries})
    return layers


def _group(entries: Mapping[str, Mapping[str, Any]], layers: Mapping[str, nn.Module]) -> None:
    """Group new layers as they were; a group of which one layer is left is none."""
    groups: dict[Any, list[str]] = {}
    for fqn in layers:
        if isinstance(index := entries[fqn].get("group"), int):
            groups.setdefault(index, []).append(fqn)
    try:
        group_layers(layers, [names for names in groups.values() if len(names) > 1])
    except ValueError as error:
        raise CheckpointError(f"the checkpoint is damaged: {error} {COPY_AGAIN}") from None


def _empty_layer(fqn: str, dense: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    for name, value in _sizes(dense).items():
        if entry.get(name) != value:
            raise CheckpointError(
                f"layer {fqn!r} has {name} {entry.get(name)!r} in the checkpoint and {value!r} in dense_model. "
                f"{OTHER_MODEL}"
            )
    bias, pivoted, narrow = entry.get("bias"), entry.get("pivoted", False), entry.get("narrow")
    if not isinstance(pivoted, bool) or (pivoted and is_conv(dense)):
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE} has pivoted {pivoted!r}. {COPY_AGAIN}")
    if not isinstance(bias, bool) or (dense.bias is not None and not bias):
        raise CheckpointError(
            f"layer {fqn!r} has bias {bias!r} in the checkpoint and {dense.bias is not None} in dense_model. "
            f"{OTHER_MODEL}"
        )
    if narrow is not None:
        return _narrow_layer(fqn, dense, narrow, bias)
    try:
        formats = entry.get("formats")
        kind = PivotedLinear if pivoted else lowrank_type(dense)
        if isinstance(formats, list) and len(formats) == 1 and kind is LowRankLinear:
            kind = EightBitLinear
        layer = kind.empty_like(dense, entry.get("rank"), bias)  # type: ignore[arg-type]
        if formats is not None:
            _set_formats(fqn, layer, formats, entry.get("dtype"))
        return layer
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE}: {error}") from None


def _narrow_layer(fqn: str, dense: nn.Module, features: Any, bias: bool) -> NarrowLinear:
    pair = isinstance(features, list) and len(features) == 2 and all(type(size) is int for size in features)
    if not isinstance(dense, nn.Linear) or not pair:
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE} has narrow {features!r}. {COPY_AGAIN}")
    try:
        return NarrowLinear.empty_like(dense, features[0], features[1], bias)
    except ValueError as error:
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE}: {error}") from None


def _set_formats(fqn: str, layer: nn.Module, formats: Any, dtype: Any) -> None:
    can = isinstance(layer, LowRankLinear) and isinstance(formats, list)
    if not can or len(formats) != len(layer.matrices) or any(form not in (None, *DTYPES) for form in formats):  # type: ignore[arg-type]
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE} has formats {formats!r}. {COPY_AGAIN}")
    if dtype not in (None, "float16", "bfloat16", "float32", "float64"):
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE} has dtype {dtype!r}. {COPY_AGAIN}")
    layer.set_formats_(tuple(formats))  # type: ignore[operator]
