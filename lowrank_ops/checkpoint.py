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
from .description import (
    CONFIG_FILE,
    COPY_AGAIN,
    OTHER_MODEL,
    CheckpointError,
    check_field,
    check_format,
    describe_layers,
    empty_layers,
)
from .files import digests, made, open_tensors, parse_json, read_header, read_tensor, replacing, write_tensors
from .layers import LowRankLinear
from .layers.pivoted import is_order
from .layers.replace import swap_
from .models.experts import experts_listed
from .models.layers import check_no_adapters, check_not_dispatched
from .models.old_optimizers import note_replaced
from .models.running import shortened, warn_caller
from .report import CompressionReport

WEIGHTS_FILE = "model.safetensors"
_EIGHT_BIT = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}  # as safetensors names them


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
            ``order`` that is not a permutation; False saves the time. Checkpoints of version 0.1 have no checksums.

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
            f"{str(file)!r} is damaged or was not written by save_pretrained: {error}. {COPY_AGAIN} For a folder "
            "that transformers wrote use from_pretrained, for the weights of a dense model model.load_state_dict."
        ) from None
    check_format(str(file), config)
    for field in ("tied", *(["checksums"] if config["version"] > 1 else [])):
        check_field(str(file), config, field, str)
    return config


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
                        raise ValueError(f"layer {fqn!r}: {source!r} is not a permutation of the outputs")
                if isinstance(target, nn.Parameter) and source not in parameters:
                    parameters[source] = nn.Parameter(values[source], target.requires_grad)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged: {error}. {COPY_AGAIN} With verify=False it is loaded as it is."
        ) from None
    return {
        name: parameters[source] if isinstance(targets[name], nn.Parameter) else values[source]
        for name, source in sources.items()
    }


def _check_names(path: Path, stored: set[str], sources: Mapping[str, str], tied: Mapping[str, str]) -> None:
    missing = [repr(name) for name, source in sources.items() if source not in stored]
    if missing:
        raise CheckpointError(
            f"{str(path)!r} lacks {shortened(missing)} of dense_model. Pass the architecture that was compressed, or "
            "save the checkpoint again."
        )
    unexpected = sorted(map(repr, (stored | set(tied)) - set(sources)))
    if unexpected:
        raise CheckpointError(f"{str(path)!r} has {shortened(unexpected)}, which dense_model does not. {OTHER_MODEL}")


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
                f"{name!r} has dtype {dtype} in {str(path)!r}, but {target.dtype} by {CONFIG_FILE}. {COPY_AGAIN}"
            )
        if dtype.startswith(("F", "BF")) != target.is_floating_point():
            raise CheckpointError(
                f"{name!r} has dtype {dtype} in {str(path)!r}, but {target.dtype} in dense_model; only a float tensor "
                f"can replace a float tensor. {OTHER_MODEL}"
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
