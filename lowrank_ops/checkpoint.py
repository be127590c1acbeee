"""Compressed models on disk: a folder with ``model.safetensors`` and ``lowrank_config.json``; nothing is pickled.

Loading reads only ``model.safetensors``, whose header holds the whole configuration; the JSON file is a copy for people
and tools. So a folder holds a consistent checkpoint even if a save was killed between the two files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .arguments import checked
from .factors.eight_bit import DTYPES
from .files import digests, made, open_tensors, parse_json, read_header, read_tensor, replacing, write_tensors
from .layers import EightBitLinear, LowRankLayer, LowRankLinear, NarrowLinear, PivotedLinear
from .layers.conv import GEOMETRY, LowRankConv
from .layers.group import group_layers, groups_in
from .layers.pivoted import is_order
from .layers.replace import lowrank_type, note_replaced, swap_
from .models.experts import experts_listed
from .models.layers import (
    check_no_adapters,
    check_not_dispatched,
    dimensions,
    find_layers,
    has_hooks,
    is_conv,
    tied_layers,
)
from .models.running import warn_caller
from .report import CompressionReport

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "lowrank_config.json"
FORMAT = "lowrank_ops.checkpoint"
FORMAT_VERSION = 5  # 1 has no checksums; 2 is written without pivoted layers, 3 without 8 bits, 4 without narrow layers

_EIGHT_BIT = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}  # as safetensors names them
_COPY_AGAIN = "Copy or save the checkpoint again."
_OTHER_MODEL = "Pass the architecture that was compressed."


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded. The message gives the reason; the model is unchanged."""


@checked()
def save_pretrained(model: nn.Module, path: str | Path, report: CompressionReport | None = None) -> None:
    """Write a model with low-rank layers to the folder ``path``, which is created if it is missing.

    ``model.safetensors`` holds the state dict in the dtypes of the model. A tensor with several names is stored once;
    tensors that only overlap, such as a weight and its transposed view, are stored separately. ``lowrank_config.json``
    holds the format version, per low-rank layer its kind, true rank, bias and sizes, and per tensor a checksum; the
    header of ``model.safetensors`` repeats it. Both files are written under temporary names, flushed to the disk, and
    renamed at the end: after a failed or killed save the folder holds the previous checkpoint or the new one.

    Args:
        model: any module; its low-rank layers are recorded.
        path: a folder; existing files of the two names are replaced.
        report: from :func:`lowrank_ops.compress_`; adds its configuration and each layer's number of calibration rows,
            which are null without it.

    Raises:
        ValueError: the state dict holds something other than tensors with values, the model has PEFT adapters, or
            ``report`` is of another model.
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> import lowrank_ops as lro
        >>> model = torch.nn.Sequential(lro.LowRankLinear(64, 32, rank=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lro.save_pretrained(model, folder)
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['lowrank_config.json', 'model.safetensors']
    """
    folder = Path(path)
    check_no_adapters(model)
    tensors, tied = _distinct_tensors(model)
    config = {
        **describe_layers(model, report),
        "compression": None if report is None else report.config.to_dict(),
        "tied": tied,
        "checksums": digests(tensors),
    }
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"path {str(path)!r} is a file; name a folder.")
    with made(folder), replacing(folder / WEIGHTS_FILE, folder / CONFIG_FILE) as (weights_file, config_file):
        write_tensors(weights_file, tensors, config)
        config_file.write(json.dumps(config, indent=2).encode() + b"\n")


@checked()
def load_pretrained(dense_model: nn.Module, path: str | Path, *, verify: bool = True) -> nn.Module:
    """Change ``dense_model`` in place into the saved model and return it.

    Everything is read and checked before the model is changed: on an error it is as before. Parameters and buffers are
    replaced by new ones, with the dtype of the file, on the device of the old ones; those on the meta device are
    loaded to the CPU, which avoids initializing weights that are about to be replaced. Training and gradient flags
    stay those of ``dense_model``. Create an optimizer after loading.

    Only ``model.safetensors`` is read. A warning names ``lowrank_config.json`` if it is missing or differs.

    Args:
        dense_model: the original architecture with its dense layers; its values do not matter.
        path: a folder that :func:`save_pretrained` wrote.
        verify: compare every tensor with its checksum, and refuse factors with NaN or inf, or a pivoted layer's
            ``order`` that has not each output once; False saves the time. Checkpoints of version 0.1 have no checksums.

    Returns:
        ``dense_model``, or the new layer where ``dense_model`` is itself the compressed layer.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, of another format, version or model.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import lowrank_ops as lro
        >>> model = torch.nn.Sequential(lro.LowRankLinear(64, 32, rank=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lro.save_pretrained(model, folder)
        ...     loaded = lro.load_pretrained(torch.nn.Sequential(torch.nn.Linear(64, 32)), folder)
        >>> loaded
        Sequential(
          (0): LowRankLinear(in_features=64, out_features=32, rank=8, bias=True)
        )
    """
    file = Path(path) / WEIGHTS_FILE
    config = _read_config(file, verify)
    with experts_listed(dense_model, names=config["layers"]):
        return _load(dense_model, file, config, verify)


def _load(dense_model: nn.Module, file: Path, config: dict[str, Any], verify: bool) -> nn.Module:
    layers = empty_layers(dense_model, config["layers"])
    targets = _targets(dense_model, layers)
    with torch.inference_mode(False):  # parameters created in inference mode cannot be trained
        tensors = _read_tensors(file, config, targets, verify)
    _warn_of_another_copy(file.with_name(CONFIG_FILE), config)
    new = {id(target): tensors[name] for name, target in targets.items()}
    for module in [*dense_model.modules(), *layers.values()]:
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if id(old) in new:
                setattr(module, name, new[id(old)])
    for fqn, entry in config["layers"].items():
        layer = layers[dense_model.get_submodule(fqn)]
        if isinstance(layer, LowRankLinear):
            layer.follow_dtype_(getattr(torch, entry.get("dtype", ""), None))
    swap_(dense_model, layers)
    note_replaced([target for target in targets.values() if isinstance(target, nn.Parameter)])
    return layers.get(dense_model, dense_model)


def _distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state dict, each once, and ``{other name: name under which it is stored}``."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[object, str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"model has a {type(tensor).__name__} in its state dict at {name!r}; checkpoints hold only tensors. "
                "Store it separately and leave it out of get_extra_state."
            )
        if is_lazy(tensor) or tensor.is_meta:
            check_not_dispatched(model)
            raise ValueError(
                f"model has no values at {name!r}: it is lazy or on the meta device. Run or load the model first."
            )
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in names:
            tied[name] = names[key]
            continue
        names[key] = name
        storage = tensor.untyped_storage().data_ptr()
        stored[name] = (tensor.clone() if storage in storages else tensor).contiguous()
        storages.add(storage)
    return stored, tied


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


def _read_config(file: Path, verify: bool) -> dict[str, Any]:
    if not file.exists():
        raise CheckpointError(
            f"path {str(file.parent)!r} has no {WEIGHTS_FILE}; pass the folder that save_pretrained wrote, or copy the "
            "whole checkpoint again."
        )
    try:
        with open_tensors(file) as stored:
            config = read_header(stored, verify=verify)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{str(file)!r} is damaged or was not written by save_pretrained: {error}. {_COPY_AGAIN} For a folder "
            "that transformers wrote use from_pretrained, for the weights of a dense model model.load_state_dict."
        ) from None
    check_format(str(file), config)
    for field in ("tied", *(["checksums"] if config["version"] > 1 else [])):
        _check_field(str(file), config, field, str)
    return config


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
    _check_field(file, config, "layers", dict)


def _check_field(file: str, config: Mapping[str, Any], field: str, kind: type) -> None:
    values = config.get(field)
    if not isinstance(values, dict) or not all(isinstance(value, kind) for value in values.values()):
        raise CheckpointError(f"{file!r} is damaged: {field!r} has the wrong type. {_COPY_AGAIN}")


def _warn_of_another_copy(file: Path, config: Mapping[str, Any]) -> None:
    try:
        same = parse_json(file.read_bytes()) == config
    except (OSError, ValueError):
        same = False
    if not same:
        warn_caller(
            f"{str(file)!r} is missing, was edited, or is of another save. The configuration in the header of "
            f"{WEIGHTS_FILE} is loaded instead; save the model again to write both."
        )


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
                f"{_OTHER_MODEL}"
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
        raise CheckpointError(f"the checkpoint is damaged: {error} {_COPY_AGAIN}") from None


def _empty_layer(fqn: str, dense: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    for name, value in _sizes(dense).items():
        if entry.get(name) != value:
            raise CheckpointError(
                f"layer {fqn!r} has {name} {entry.get(name)!r} in the checkpoint and {value!r} in dense_model. "
                f"{_OTHER_MODEL}"
            )
    bias, pivoted, narrow = entry.get("bias"), entry.get("pivoted", False), entry.get("narrow")
    if not isinstance(pivoted, bool) or (pivoted and is_conv(dense)):
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE} has pivoted {pivoted!r}. {_COPY_AGAIN}")
    if not isinstance(bias, bool) or (dense.bias is not None and not bias):
        raise CheckpointError(
            f"layer {fqn!r} has bias {bias!r} in the checkpoint and {dense.bias is not None} in dense_model. "
            f"{_OTHER_MODEL}"
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
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE} has narrow {features!r}. {_COPY_AGAIN}")
    try:
        return NarrowLinear.empty_like(dense, features[0], features[1], bias)
    except ValueError as error:
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE}: {error}") from None


def _set_formats(fqn: str, layer: nn.Module, formats: Any, dtype: Any) -> None:
    can = isinstance(layer, LowRankLinear) and isinstance(formats, list)
    if not can or len(formats) != len(layer.matrices) or any(form not in (None, *DTYPES) for form in formats):  # type: ignore[arg-type]
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE} has formats {formats!r}. {_COPY_AGAIN}")
    if dtype not in (None, "float16", "bfloat16", "float32", "float64"):
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE} has dtype {dtype!r}. {_COPY_AGAIN}")
    layer.set_formats_(tuple(formats))  # type: ignore[operator]


def _targets(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> dict[str, Tensor]:
    """The state dict that the model will have, with the tensors whose values are to be replaced."""
    targets = model.state_dict(keep_vars=True)
    for fqn, module in model.named_modules(remove_duplicate=False):
        if module in layers:
            prefix = f"{fqn}." if fqn else ""
            for name in module.state_dict():
                del targets[prefix + name]
            targets |= layers[module].state_dict(prefix=prefix, keep_vars=True)
    for name, tensor in targets.items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor):
            raise CheckpointError(
                f"dense_model has no tensor at {name!r} of its state dict but a {type(tensor).__name__}; "
                "initialize lazy modules by running the model once."
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in targets:
            raise CheckpointError(
                f"buffer {name!r} of dense_model is on the meta device and not persistent, so the checkpoint has no "
                "values for it. Build dense_model on a real device."
            )
    return targets


def _read_tensors(
    path: Path, config: Mapping[str, Any], targets: Mapping[str, Tensor], verify: bool
) -> dict[str, Tensor]:
    """New parameters and buffers for all targets; names that are one tensor in the checkpoint get one object."""
    sources = {name: config["tied"].get(name, name) for name in targets}
    values: dict[str, Tensor] = {}
    parameters: dict[str, nn.Parameter] = {}
    try:
        with open_tensors(path) as file:
            _check_names(path, set(file.keys()), sources, config["tied"])
            _check_ties(targets, sources)
            stored = {name: file.get_slice(source) for name, source in sources.items()}
            _check_shapes_and_dtypes(path, config["layers"], targets, stored)
            for name, source in sources.items():
                target = targets[name]
                if source not in values:
                    # Copy: the tensor is memory of the mapped file, which is not aligned as fast kernels require.
                    tensor = read_tensor(file, source, config.get("checksums") if verify else None)
                    values[source] = tensor.to("cpu" if target.is_meta else target.device, copy=True)
                    fqn = source.rpartition(".")[0]
                    wide = values[source].float() if values[source].dtype in _EIGHT_BIT else values[source]
                    if verify and fqn in config["layers"] and not bool(wide.isfinite().all()):
                        raise ValueError(f"layer {fqn!r} has NaN or inf in {source!r}")
                    of_pivoted = fqn in config["layers"] and config["layers"][fqn].get("pivoted")
                    if verify and of_pivoted and source.endswith("order") and not is_order(values[source]):
                        raise ValueError(f"layer {fqn!r} has in {source!r} not each output once")
                if isinstance(target, nn.Parameter) and source not in parameters:
                    parameters[source] = nn.Parameter(values[source], target.requires_grad)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged: {error}. {_COPY_AGAIN} With verify=False it is loaded as it is."
        ) from None
    return {
        name: parameters[source] if isinstance(targets[name], nn.Parameter) else values[source]
        for name, source in sources.items()
    }


def _check_names(path: Path, stored: set[str], sources: Mapping[str, str], tied: Mapping[str, str]) -> None:
    missing = [name for name, source in sources.items() if source not in stored]
    if missing:
        raise CheckpointError(
            f"{str(path)!r} lacks {_listed(missing)} of dense_model. Pass the architecture that was compressed, or "
            "save the checkpoint again."
        )
    unexpected = sorted((stored | set(tied)) - set(sources))
    if unexpected:
        raise CheckpointError(f"{str(path)!r} has {_listed(unexpected)}, which dense_model does not. {_OTHER_MODEL}")


def _check_ties(targets: Mapping[str, Tensor], sources: Mapping[str, str]) -> None:
    first: dict[int, str] = {}
    for name, target in targets.items():
        other = first.setdefault(id(target), name)
        if sources[other] != sources[name]:
            raise CheckpointError(
                f"{other!r} and {name!r} are one tensor in dense_model and two in the checkpoint; untie them in "
                "dense_model."
            )


def _check_shapes_and_dtypes(
    path: Path, layers: Mapping[str, Any], targets: Mapping[str, Tensor], stored: Mapping[str, Any]
) -> None:
    for name, target in targets.items():
        shape, dtype = tuple(stored[name].get_shape()), stored[name].get_dtype()
        if shape != tuple(target.shape):
            raise CheckpointError(
                f"{name!r} has shape {shape} in {str(path)!r}, but {tuple(target.shape)} by dense_model and the ranks "
                f"of {CONFIG_FILE}. Pass the architecture that was compressed, or save the checkpoint again."
            )
        if dtype != _EIGHT_BIT.get(target.dtype, dtype):
            raise CheckpointError(
                f"{name!r} has dtype {dtype} in {str(path)!r}, but {target.dtype} by {CONFIG_FILE}. {_COPY_AGAIN}"
            )
        if dtype.startswith(("F", "BF")) != target.is_floating_point():
            raise CheckpointError(
                f"{name!r} has dtype {dtype} in {str(path)!r}, but {target.dtype} in dense_model; only a float tensor "
                f"can replace a float tensor. {_OTHER_MODEL}"
            )
    for fqn, entry in layers.items():
        formats = [*entry.get("formats", (None, None)), None]
        parts = ("down", "up", "bias") if len(formats) == 3 else ("values", "bias")
        if "narrow" in entry:
            parts, formats = ("weight", "bias"), [None, None]
        names = [f"{fqn}.{part}" if fqn else part for part, form in zip(parts, formats, strict=True) if form is None]
        dtypes = {stored[name].get_dtype() for name in names if name in stored}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"layer {fqn!r} has tensors of dtypes {', '.join(sorted(dtypes))} in {str(path)!r}; its factors and "
                "bias must share one. Save the checkpoint again."
            )


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(map(repr, names[:limit]))
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
