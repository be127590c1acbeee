"""Compressed models on disk: a folder with ``model.safetensors`` and ``lowrank_config.json``. Nothing is pickled.

The configuration is also kept in the header of the tensor file, so that two files that are not of one save, as an
interrupted overwrite leaves them, are noticed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .layers import LowRankConv2d, LowRankLinear
from .layers.replace import swap_, tied_layers
from .models.layers import dimensions, find_layers
from .report import CompressionReport

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "lowrank_config.json"
FORMAT = "lowrank_ops.checkpoint"
FORMAT_VERSION = 1

_METADATA_KEY = "lowrank_ops"
_CONV_SHAPE = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message says why, and the model is as it was."""


def save_pretrained(model: nn.Module, path: str | Path, report: CompressionReport | None = None) -> None:
    """Write a model with factorised layers to the folder ``path``, which is made if it is missing.

    ``model.safetensors`` holds the whole state dict in the dtypes of the model. A tensor that has several names is
    stored once; tensors that merely overlap, such as a weight and its transposed view, are stored as separate ones.
    ``lowrank_config.json`` holds the format version and, per factorised layer, its kind, true rank, bias and sizes.
    Both are written under temporary names and put in place at the end.

    Args:
        model: any module; LowRankLinear and LowRankConv2d layers are recorded, the rest needs no record.
        path: a folder; files of these names in it are replaced.
        report: from :func:`lowrank_ops.compress_`; adds its configuration and the calibration rows of each layer,
            which are null without it.

    Raises:
        ValueError: the state dict holds something other than tensors with values, or ``report`` is of another model.
        OSError: the folder cannot be written.
    """
    tensors, tied = _distinct_tensors(model)
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "compression": None if report is None else report.config.to_dict(),
        "layers": _layer_entries(model, report),
        "tied": tied,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    try:
        save_file(tensors, unfinished[WEIGHTS_FILE], metadata={"format": "pt", _METADATA_KEY: json.dumps(config)})
        unfinished[CONFIG_FILE].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(unfinished[CONFIG_FILE], unfinished[WEIGHTS_FILE])  # safetensors makes files private
        for name, file in unfinished.items():
            os.replace(file, folder / name)
    finally:
        for file in unfinished.values():
            file.unlink(missing_ok=True)


def load_pretrained(dense_model: nn.Module, path: str | Path) -> nn.Module:
    """Turn a model of the original architecture into the saved one, in place.

    Everything is checked and read before the model is touched: it is loaded whole, or left as it was. Parameters and
    buffers are replaced by new ones that take their **dtype from the file** and stay on the **device of
    ``dense_model``**; those on the meta device come to the CPU, which saves the memory of weights that are about to be
    replaced. Gradient and training flags are those of ``dense_model``. Create an optimizer afterwards.

    Args:
        dense_model: the original architecture with its dense layers; its values do not matter.
        path: the folder that :func:`save_pretrained` wrote.

    Returns:
        ``dense_model``; where the model itself is the one factorised layer, its replacement.

    Raises:
        CheckpointError: the checkpoint is missing, truncated, foreign, of another version or of another model.
    """
    folder = Path(path)
    config = _read_config(folder)
    layers = _empty_layers(dense_model, config["layers"])
    slots = _slots(dense_model, layers)
    with torch.inference_mode(False):  # parameters made in inference mode could not be trained
        tensors = _read_tensors(folder / WEIGHTS_FILE, config, slots)
    new = {id(slot): tensors[name] for name, slot in slots.items()}
    for module in [*dense_model.modules(), *layers.values()]:
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if id(old) in new:
                setattr(module, name, new[id(old)])
    swap_(dense_model, layers)
    return layers.get(dense_model, dense_model)


def _distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state dict, each once, and ``{other name: name under which it is kept}``."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[object, str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"model keeps a {type(tensor).__name__} in its state dict at {name!r}; checkpoints hold only tensors. "
                "Store it apart and leave it out of get_extra_state."
            )
        if is_lazy(tensor) or tensor.is_meta:
            raise ValueError(
                f"model holds no values at {name!r}: it is lazy or on the meta device. Run or load the model first."
            )
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in names:
            tied[name] = names[key]
            continue
        names[key] = name
        storage = tensor.untyped_storage().data_ptr()
        kept[name] = (tensor.clone() if storage in storages else tensor).contiguous()
        storages.add(storage)
    return kept, tied


def _layer_entries(model: nn.Module, report: CompressionReport | None) -> dict[str, dict[str, Any]]:
    rows = {} if report is None else {row.fqn: row for row in report.layers if row.rank is not None}
    entries = {
        fqn: {
            **_shape(module),
            "rank": module.rank,
            "bias": module.bias is not None,
            "calibration_rows": rows[fqn].rows if fqn in rows else None,
        }
        for fqn, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (LowRankLinear, LowRankConv2d))
    }
    for fqn, row in rows.items():
        if fqn not in entries or entries[fqn]["rank"] != row.rank:
            raise ValueError(
                f"report does not describe model: it gives layer {fqn!r} rank {row.rank}, which it does not have in "
                "model. Pass the report that compress_ returned for this very model, or none."
            )
    return entries


def _shape(layer: nn.Module) -> dict[str, Any]:
    """Kind and sizes of a dense or factorised layer, as plain JSON types."""
    if isinstance(layer, (nn.Conv2d, LowRankConv2d)):
        values = {name: getattr(layer, name) for name in _CONV_SHAPE}
        return {"kind": "conv2d"} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
        }
    if isinstance(layer, LowRankLinear):
        in_features, out_features = layer.in_features, layer.out_features
    else:
        _, in_features, out_features = dimensions(layer)
    return {"kind": "linear", "in_features": in_features, "out_features": out_features}


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"path {str(folder)!r} holds no {CONFIG_FILE}; pass the folder that save_pretrained wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}. Copy or save the checkpoint again.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{str(file)!r} was not written by save_pretrained: its format is not {FORMAT!r}.")
    if config.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{str(file)!r} has format version {config.get('version')!r}; this lowrank_ops reads version "
            f"{FORMAT_VERSION}. Update lowrank_ops, or save the checkpoint again with this one."
        )
    layers, tied = config.get("layers"), config.get("tied")
    if not _is_object_of(layers, dict) or not _is_object_of(tied, str):
        raise CheckpointError(
            f"{str(file)!r} is damaged: 'layers' must map names to objects and 'tied' names to names. "
            "Copy or save the checkpoint again."
        )
    return config


def _is_object_of(values: object, kind: type) -> bool:
    return isinstance(values, dict) and all(isinstance(value, kind) for value in values.values())


def _empty_layers(model: nn.Module, entries: Mapping[str, Mapping[str, Any]]) -> dict[nn.Module, nn.Module]:
    """``{dense layer: its replacement without values}``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for fqn, module in modules.items():
        if isinstance(module, (LowRankLinear, LowRankConv2d)):
            raise CheckpointError(
                f"dense_model is compressed already: {fqn or 'the model'} is a {type(module).__name__}. Build the "
                "original architecture anew and load into that."
            )
    found, skipped = find_layers(model)
    compressible, tied = set(found.values()), tied_layers(model)
    layers: dict[nn.Module, nn.Module] = {}
    for fqn, entry in entries.items():
        dense = modules.get(fqn)
        if dense not in compressible or dense is None:
            kind = "has no module of that name" if dense is None else f"has a {type(dense).__name__} there"
            reason = f" ({skipped[fqn]})" if fqn in skipped else ""
            raise CheckpointError(
                f"the checkpoint has a factorised {entry.get('kind')} layer {fqn!r}, but dense_model {kind}{reason}. "
                "Pass the architecture that was compressed."
            )
        if fqn in tied:
            raise CheckpointError(
                f"dense_model ties the weight of layer {fqn!r} to {tied[fqn]!r}, but the checkpoint has factors in its "
                "place. Untie the two as before the compression."
            )
        if any((dense._forward_hooks, dense._forward_pre_hooks, dense._backward_hooks)):
            raise CheckpointError(f"layer {fqn!r} of dense_model has hooks, which would be dropped; remove them first.")
        layers[dense] = _empty_layer(fqn, dense, entry)
    return layers


def _empty_layer(fqn: str, dense: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    for name, value in _shape(dense).items():
        if entry.get(name) != value:
            raise CheckpointError(
                f"layer {fqn!r} has {name} {entry.get(name)!r} in the checkpoint and {value!r} in dense_model. "
                "Pass the architecture that was compressed."
            )
    bias = entry.get("bias")
    if not isinstance(bias, bool) or (dense.bias is not None and not bias):
        raise CheckpointError(
            f"layer {fqn!r} has bias {bias!r} in the checkpoint and {dense.bias is not None} in dense_model. "
            "Pass the architecture that was compressed."
        )
    try:
        if isinstance(dense, nn.Conv2d):
            return LowRankConv2d.empty_like(dense, entry.get("rank"), bias)  # type: ignore[arg-type]
        return LowRankLinear.empty_like(dense, entry.get("rank"), bias)  # type: ignore[arg-type]
    except ValueError as error:
        raise CheckpointError(f"layer {fqn!r} of {CONFIG_FILE}: {error}") from None


def _slots(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> dict[str, Tensor]:
    """The state dict that the model will have, holding the tensors that are to be replaced."""
    slots = model.state_dict(keep_vars=True)
    for fqn, module in model.named_modules(remove_duplicate=False):
        if module in layers:
            prefix = f"{fqn}." if fqn else ""
            for name in module.state_dict():
                del slots[prefix + name]
            for name, tensor in layers[module].state_dict(keep_vars=True).items():
                slots[prefix + name] = tensor
    for name, tensor in slots.items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor):
            raise CheckpointError(
                f"dense_model has no tensor at {name!r} of its state dict but a {type(tensor).__name__}; "
                "initialise lazy modules by running the model once."
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in slots:
            raise CheckpointError(
                f"buffer {name!r} of dense_model is on the meta device and not part of checkpoints, so it would stay "
                "without values. Build dense_model on a real device."
            )
    return slots


def _read_tensors(path: Path, config: Mapping[str, Any], slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New parameters and buffers for all slots; names that are one tensor in the checkpoint get one object."""
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{str(path)!r} is missing; copy or save the whole checkpoint again.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} is truncated or no safetensors file: {error}. Copy or save the checkpoint again."
        ) from None
    with file:
        _check_pair(path, file.metadata(), config)
        sources = {name: config["tied"].get(name, name) for name in slots}
        _check_names(path, set(file.keys()), sources, config["tied"])
        _check_ties(slots, sources)
        for name, source in sources.items():
            _check_tensor(path, name, slots[name], file.get_slice(source))
        _check_layer_dtypes(path, config["layers"], {name: file.get_slice(sources[name]).get_dtype() for name in slots})
        values: dict[str, Tensor] = {}
        parameters: dict[str, nn.Parameter] = {}
        for name, source in sources.items():
            slot = slots[name]
            if source not in values:
                # A copy: what get_tensor gives lies in the mapped file, at addresses too odd for the fast kernels.
                values[source] = file.get_tensor(source).to("cpu" if slot.is_meta else slot.device, copy=True)
            if isinstance(slot, nn.Parameter) and source not in parameters:
                parameters[source] = nn.Parameter(values[source], slot.requires_grad)
        return {
            name: parameters[source] if isinstance(slots[name], nn.Parameter) else values[source]
            for name, source in sources.items()
        }


def _check_pair(path: Path, metadata: Mapping[str, str] | None, config: Mapping[str, Any]) -> None:
    try:
        own = json.loads((metadata or {})[_METADATA_KEY])
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{str(path)!r} was not written by save_pretrained: its header holds no lowrank_ops configuration. For "
            "the weights of a dense model use model.load_state_dict."
        ) from None
    if own != config:
        raise CheckpointError(
            f"{CONFIG_FILE} does not belong to {str(path)!r}, whose header holds another configuration: one of the two "
            "was edited or comes from another save. Copy or save both again."
        )


def _check_names(path: Path, stored: set[str], sources: Mapping[str, str], tied: Mapping[str, str]) -> None:
    missing = [name for name, source in sources.items() if source not in stored]
    if missing:
        raise CheckpointError(
            f"{str(path)!r} lacks {_listed(missing)} of dense_model. Pass the architecture that was compressed, or "
            "save the checkpoint again."
        )
    unexpected = sorted((stored | set(tied)) - set(sources))
    if unexpected:
        raise CheckpointError(
            f"{str(path)!r} holds {_listed(unexpected)}, for which dense_model has no place. Pass the architecture "
            "that was compressed."
        )


def _check_ties(slots: Mapping[str, Tensor], sources: Mapping[str, str]) -> None:
    first: dict[int, str] = {}
    for name, slot in slots.items():
        other = first.setdefault(id(slot), name)
        if sources[other] != sources[name]:
            raise CheckpointError(
                f"dense_model has one tensor at {other!r} and {name!r}, the checkpoint two; untie them in dense_model."
            )


def _check_tensor(path: Path, name: str, slot: Tensor, stored: Any) -> None:
    shape = tuple(stored.get_shape())
    if shape != tuple(slot.shape):
        raise CheckpointError(
            f"{name!r} has shape {shape} in {str(path)!r}, but {tuple(slot.shape)} by dense_model and the ranks of "
            f"{CONFIG_FILE}. Pass the architecture that was compressed, or save the checkpoint again."
        )
    if _is_float(stored.get_dtype()) != slot.is_floating_point():
        raise CheckpointError(
            f"{name!r} has dtype {stored.get_dtype()} in {str(path)!r}, but {slot.dtype} in dense_model; a float "
            "can only take the place of a float. Pass the architecture that was compressed."
        )


def _check_layer_dtypes(path: Path, layers: Iterable[str], dtypes: Mapping[str, str]) -> None:
    for fqn in layers:
        names = [f"{fqn}.{part}" if fqn else part for part in ("down", "up", "bias")]
        found = {dtypes[name] for name in names if name in dtypes}
        if len(found) > 1:
            raise CheckpointError(
                f"layer {fqn!r} has tensors of dtypes {', '.join(sorted(found))} in {str(path)!r}; its factors and "
                "bias must share one. Save the checkpoint again."
            )


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def _listed(names: list[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
