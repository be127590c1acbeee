"""Compress a folder of safetensors into another one, layer by layer: for models that are larger than the memory.

The model is built without values, so that the steps of ``compress_`` find its layers. Weights are read when a step
needs them: once for ranks that depend on spectra, and once for the factors, which are written one by one.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import checked
from .calibration.covariances import Covariances
from .checkpoint import WEIGHTS_FILE
from .config import CompressionConfig
from .considered import considered_layers, resolved
from .description import CONFIG_FILE, describe_layers
from .factors.layer_by_layer import as_stored, decompose, factorize_layers
from .factors.memory import bytes_to_spare
from .factors.projections import Factors
from .files import (
    HEADER,
    form_of,
    made,
    open_tensors,
    parse_json,
    read_header,
    read_tensor,
    replacing,
    write_stream,
)
from .layers import EightBitLinear, LowRankLayer, LowRankLinear, group_
from .layers.replace import lowrank_type, swap_
from .models.layers import all_finite, fused_projections
from .models.memory import parse_bytes
from .models.running import available, shortened, warn_of_few_rows
from .policies import RankPolicy
from .ranks.choose import Rounded
from .ranks.groups import choose_grouped_sizes
from .report import CompressionReport
from .subspaces.layer import LayerSubspaces

INDEX_FILE = "model.safetensors.index.json"
_COPIED = (".jinja", ".json", ".model", ".tiktoken", ".txt")  # of the tokenizer and the processors


@checked()
def compress_folder(
    source: str | Path,
    target: str | Path,
    covariances: Covariances,
    config: CompressionConfig | RankPolicy | int | None = None,
    *,
    device: torch.device | str | None = None,
    max_memory: int | str | None = None,
    progress: bool = False,
) -> CompressionReport:
    """Compress the model in a folder without loading it; the result is that of :func:`lowrank_ops.compress_`.

    One layer is in memory at a time, besides ``covariances``. Weights are read once for the factors, and once before if
    ranks depend on spectra; decompositions are then computed twice, because none is kept.

    Args:
        source: a transformers checkpoint (config.json, and one safetensors file or several with an index), or any
            folder of safetensors files with one state dict. In the latter, matrices that ``covariances`` name are
            taken as weights of ``nn.Linear``; other layers, such as convolutions, stay dense, because a state dict
            does not describe them.
        target: a folder, created if it is missing. A transformers model gets the same files as in ``source``, for
            ``from_pretrained``; another one gets those of :func:`lowrank_ops.save_pretrained`, for
            :func:`lowrank_ops.load_pretrained`. All files are written, or none.
        covariances: of the model; ``Covariances.load(path, packed=True)`` leaves their sums in the file.
        config: as for :func:`lowrank_ops.compress_`. Policies that run the model take stored figures, such as
            ``LatencyBudget(0.5, LayerLatencies.load(path))``; a reconstruction needs the model in memory.
        device: where factors are computed; the CPU by default.
        max_memory: as for :func:`lowrank_ops.compress_`. A layer that needs more is an error at the start.
        progress: show progress bars with the time left.

    Raises:
        FileNotFoundError: ``source`` has no safetensors files.
        TypeError: an argument of another type.
        ValueError: ``source`` is damaged, already compressed or of a class that transformers does not have; covariances
            of another model; a budget that cannot be met; an unavailable ``device``; a layer that needs more than
            ``max_memory``; ``target`` holds other weights.
            Values are compared with the checksums that :func:`lowrank_ops.save_pretrained` writes.

    Example:
        >>> import tempfile, torch, lowrank_ops as lro
        >>> from lowrank_ops.folders import compress_folder
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> covariances = lro.calibrate(model, [torch.randn(256, 64)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lro.save_pretrained(model, f"{folder}/dense")
        ...     report = compress_folder(f"{folder}/dense", f"{folder}/smaller", covariances, lro.ParameterBudget(0.5))
        ...     smaller = lro.load_pretrained(model, f"{folder}/smaller")
        >>> [type(layer).__name__ for layer in smaller]
        ['LowRankLinear', 'ReLU', 'LowRankLinear']
    """
    config = CompressionConfig.of(config)
    if config.reconstruction is not None:
        raise ValueError("a reconstruction runs the model; load it and call compress_(..., reconstruction=...).")
    if config.channels_of:
        raise ValueError(
            "channels runs the MLPs of the model, which compress_folder does not load; load it and call compress_."
        )
    bound = None if max_memory is None else parse_bytes(max_memory)
    weights, folder = _Weights(Path(source)), Path(target)
    of_transformers = "model_type" in weights.config
    _check_target(weights, folder, of_transformers)
    model, undescribed = _empty_model(weights, covariances)
    modules = dict(model.named_modules())
    subspaces, skipped = considered_layers(
        model,
        covariances,
        None,
        None,
        centered=config.centered,
        device=available(device or "cpu"),
        load=lambda fqn: weights.layer(fqn, modules[fqn]),
    )
    config = resolved(config, subspaces)
    if bound is not None:
        bytes_to_spare(subspaces, config, bound)
    decompose(config.rank, subspaces, progress, max_held_bytes=0)
    ranks, eight_bit, groups = choose_grouped_sizes(config, subspaces)
    with torch.inference_mode(False):
        new = _empty_layers(modules, subspaces, ranks, eight_bit, config)
        layout = _layout(weights, new, one_file=not of_transformers)
        compressed = copy.deepcopy(model)
        swap_(compressed, {compressed.get_submodule(fqn): layer for fqn, layer in new.items()})
        described = describe_layers(group_(compressed, groups))
    for fqn, entry in described["layers"].items():
        entry["calibration_rows"] = subspaces[fqn].rows
    texts: dict[str, dict[str, Any]] = {}
    if of_transformers:
        from .integrations.transformers import description

        texts["config.json"] = description(compressed)
        if weights.index is not None:
            texts[INDEX_FILE] = _index(layout)
    names = [*layout, *(texts if of_transformers else [CONFIG_FILE])]
    copied = [
        path for path in (weights.folder.iterdir() if of_transformers else ())
        if path.suffix in _COPIED and path.name not in (*names, INDEX_FILE, CONFIG_FILE) and path.is_file()
    ]  # fmt: skip
    found: dict[str, Factors] = {}
    tensors = _tensors(weights, layout, new, subspaces, ranks, eight_bit, config, found, progress)
    places = [folder / name for name in (*names, *(path.name for path in copied))]
    with made(folder), replacing(*places) as files:
        for file, forms in zip(files, layout.values(), strict=False):
            mine = itertools.islice(tensors, len(forms))
            if of_transformers:
                write_stream(file, forms, mine)
            else:
                header = {**described, "compression": config.to_dict(), "tied": weights.tied}
                texts[CONFIG_FILE] = write_stream(file, forms, mine, header)
        for name, file in zip(names[len(layout) :], files[len(layout) : len(names)], strict=True):
            file.write(json.dumps(texts[name], indent=2).encode() + b"\n")
        for path, file in zip(copied, files[len(names) :], strict=True):
            with path.open("rb") as original:
                shutil.copyfileobj(original, file)
    next(tensors, None)  # ends the progress bar
    report = CompressionReport.build(model, config, subspaces, found, {**skipped, **undescribed}, groups)
    warn_of_few_rows(report.few_rows())
    return report


def _empty_model(weights: _Weights, covariances: Covariances) -> tuple[nn.Module, dict[str, str]]:
    """The model, with the biases of its calibrated layers, and the layers that a state dict does not describe, and why.

    Raises:
        ValueError: transformers cannot build it, or ``covariances`` are of another model.
    """
    model: nn.Module
    undescribed: dict[str, str] = {}
    if "model_type" in weights.config:
        from .integrations.transformers import empty_model

        try:
            model = empty_model(weights.folder, weights.forms)
        except (OSError, ValueError):
            raise
        except Exception as error:  # of the class, which does not check its configuration
            raise ValueError(
                f"source {str(weights.folder)!r}: transformers cannot build the model of config.json: "
                f"{type(error).__name__}: {error}."
            ) from error
    else:
        model, undescribed = _model_of_state_dict(weights, covariances)
    modules = dict(model.named_modules())
    _check_names(weights, modules, covariances)
    for fqn in covariances:
        if fqn in modules and f"{fqn}.bias" in weights.forms:
            modules[fqn].bias = nn.Parameter(weights.read(f"{fqn}.bias").clone(), requires_grad=False)
    return model, undescribed


class _Weights:
    """The tensors of a folder, read one by one.

    Attributes:
        config: of config.json; empty without.
        forms: the tensors by name, without values.
        files: the name of the file of each tensor.
        checksums: of files that this package wrote; None for other tensors.
        tied: ``{other name: name under which a tensor is stored}``, as this package and safetensors write it.
        index: of several files; None without.

    Raises:
        FileNotFoundError, ValueError: as for :func:`compress_folder`.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"source {str(folder)!r} is not a folder; pass the one that holds the model's files."
            )
        self.folder, index, config = folder, folder / INDEX_FILE, folder / "config.json"
        try:
            self.config: dict[str, Any] = {**parse_json(config.read_bytes())} if config.exists() else {}
            self.index = {**parse_json(index.read_bytes())["weight_map"]} if index.exists() else None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"source {str(folder)!r}: config.json or {INDEX_FILE} is damaged: {error}.") from None
        paths = sorted(folder.glob("*.safetensors"))
        names = [path.name for path in paths]
        for name in (self.index or {}).values():  # the target gets files of these names, so none of another folder
            if name not in names:
                problem = f"{INDEX_FILE} names {name!r}, which the folder does not hold"
                raise ValueError(f"source {str(folder)!r}: {problem}; copy it again.")
        names = names if self.index is None else sorted(set(self.index.values()))
        if self.index is None and WEIGHTS_FILE in names:
            names = [WEIGHTS_FILE]
        if not names:
            raise FileNotFoundError(f"source {str(folder)!r} has no safetensors files; save the model in that format.")
        self.forms: dict[str, Tensor] = {}
        self.files: dict[str, str] = {}
        self.checksums: dict[str, str | None] = {}
        self.tied: dict[str, str] = {}
        for name in names:
            self._open(name)
        lost = sorted(set(self.index or ()) ^ set(self.forms if self.index is not None else ()))
        if lost:
            raise ValueError(f"source {str(folder)!r}: index and files differ at {shortened(lost)}; copy it again.")

    def _open(self, name: str) -> None:
        path = self.folder / name
        try:
            with open_tensors(path) as file:
                metadata, forms = file.metadata() or {}, {key: form_of(file, key) for key in list(file.keys())}
                header = read_header(file) if HEADER in metadata else {}
                tied = {**(header.get("tied") or {})}
                self.checksums |= dict.fromkeys(forms, None) | {**(header.get("checksums") or {})}
        except ValueError as error:
            raise ValueError(f"source: {str(path)!r} is damaged: {error}. Copy it again.") from None
        if header.get("layers"):
            raise ValueError(f"source {str(self.folder)!r} is already compressed; pass the folder of the dense model.")
        if twice := sorted(forms.keys() & self.forms.keys()):
            raise ValueError(
                f"source {str(self.folder)!r} holds {twice[0]!r} in two files; leave one state dict there."
            )
        self.forms |= forms
        self.files |= dict.fromkeys(forms, name)
        self.tied |= tied or {key: value for key, value in metadata.items() if value in forms and key not in forms}

    def read(self, name: str) -> Tensor:
        """A tensor, which is memory of the file until it is copied."""
        path = self.folder / self.files[name]
        try:
            with open_tensors(path) as file:
                checksum = self.checksums[name]
                return read_tensor(file, name, None if checksum is None else {name: checksum})
        except ValueError as error:
            raise ValueError(f"source: {str(path)!r} is damaged: {error}. Copy it again.") from None

    def layer(self, fqn: str, empty: nn.Module) -> nn.Module:
        """The layer ``empty`` with its weight."""
        layer, weight = copy.deepcopy(empty), self.read(f"{fqn}.weight").clone()
        if not all_finite(weight):
            raise ValueError(f"layer {fqn!r}: its weight holds NaN or inf; repair the model.")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer


def _model_of_state_dict(weights: _Weights, covariances: Covariances) -> tuple[nn.Module, dict[str, str]]:
    """Modules with the names of a state dict, and the reason for each layer of ``covariances`` that has none."""
    model, undescribed = nn.Module(), {}
    places = {"": model}

    def place(fqn: str) -> nn.Module:
        if fqn not in places:
            parent, _, name = fqn.rpartition(".")
            places[fqn] = nn.Module()
            place(parent).add_module(name, places[fqn])
        return places[fqn]

    for fqn in [*covariances, *covariances.unreached, *covariances.skipped]:
        weight, bias = (weights.forms.get(f"{fqn}.{name}") for name in ("weight", "bias"))
        if weight is None or not fqn:
            continue
        if weight.dim() != 2:
            undescribed[fqn] = (
                f"its weight has {weight.dim()} dimensions, and a state dict does not say what it does; compress the "
                "loaded model instead"
            )
            continue
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(
                f"source {str(weights.folder)!r}: {fqn}.bias is {tuple(bias.shape)} of {bias.dtype}, which does not "
                f"fit {fqn}.weight, {tuple(weight.shape)} of {weight.dtype}."
            )
        sizes = weight.shape[1], weight.shape[0], bias is not None
        places[fqn] = nn.utils.skip_init(nn.Linear, *sizes, device="meta")
        parent, _, name = fqn.rpartition(".")
        place(parent).add_module(name, places[fqn])
    parameters = {name: nn.Parameter(form, requires_grad=False) for name, form in weights.forms.items()}
    for name in [*parameters, *weights.tied]:
        fqn, _, last = name.rpartition(".")
        try:
            place(fqn).register_parameter(last, parameters[weights.tied.get(name, name)])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"source {str(weights.folder)!r} holds {name!r}, which cannot be the name of a parameter: {error}."
            ) from None
    return model, undescribed


def _check_names(weights: _Weights, modules: Mapping[str, nn.Module], covariances: Covariances) -> None:
    experts = [fqn for fqn, module in modules.items() if fused_projections(module)]
    named = modules[""].named_parameters(remove_duplicate=False)
    stored = {id(parameter) for name, parameter in named if name in weights.forms}
    for fqn in covariances:
        if fqn.startswith(tuple(f"{expert}." for expert in experts)):
            raise ValueError(
                f"layer {fqn!r} is one of fused experts, which are compressed in memory only; load the model and call "
                "compress_."
            )
        own = dict(modules[fqn].named_parameters(recurse=False)) if fqn in modules else {}
        if lost := [f"{fqn}.{name}" for name, parameter in own.items() if id(parameter) not in stored]:
            raise ValueError(
                f"source {str(weights.folder)!r} has no {lost[0]!r}, or by a name that transformers converts when it "
                "loads it; load the model, save it by model.save_pretrained, and pass that folder."
            )


def _empty_layers(
    modules: Mapping[str, nn.Module],
    subspaces: Mapping[str, LayerSubspaces],
    ranks: Mapping[str, int | None],
    eight_bit: Mapping[str, Rounded],
    config: CompressionConfig,
) -> dict[str, LowRankLayer]:
    """The low-rank and 8-bit layers, without values."""
    shifted = config.centered and config.projection != "weight"
    new: dict[str, LowRankLayer] = {}
    for fqn, rank in ranks.items():
        if rank is not None or fqn in eight_bit:
            kind = EightBitLinear if rank is None else lowrank_type(modules[fqn], rank if config.pivoted else None)
            bias = subspaces[fqn].bias is not None or (shifted and rank is not None)
            new[fqn] = kind.empty_like(modules[fqn], rank or 0, bias)
    if not new:
        raise ValueError("every layer stays dense at these ranks, so nothing was written; allow smaller ranks.")
    new = {fqn: layer.to("meta") for fqn, layer in new.items()}
    for fqn, (formats, _, _) in eight_bit.items():
        layer = new[fqn]
        assert isinstance(layer, LowRankLinear)
        layer.set_formats_(formats)
    return new


def _layout(weights: _Weights, new: Mapping[str, nn.Module], *, one_file: bool) -> dict[str, dict[str, Tensor]]:
    """The files to write, with the forms of their tensors: factors are where their dense weight was."""
    layout: dict[str, dict[str, Tensor]] = {}
    for name, form in weights.forms.items():
        fqn, _, last = name.rpartition(".")
        forms = layout.setdefault(WEIGHTS_FILE if one_file else weights.files[name], {})
        if fqn not in new:
            forms[name] = form
        elif last == "weight":
            forms |= {f"{fqn}.{part}": value for part, value in new[fqn].state_dict().items()}
    return {name: forms for name, forms in layout.items() if forms}


def _index(layout: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    forms = [form for part in layout.values() for form in part.values()]
    sizes = {
        "total_parameters": sum(form.numel() for form in forms),
        "total_size": sum(form.numel() * form.element_size() for form in forms),
    }
    places = {name: file for file, part in layout.items() for name in part}
    return {"metadata": sizes, "weight_map": dict(sorted(places.items()))}


def _check_target(weights: _Weights, folder: Path, of_transformers: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"target {str(folder)!r} is a file; name a folder.")
    if folder.samefile(weights.folder):
        raise ValueError("target is source; name another folder.")
    held = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")}
    held |= {INDEX_FILE} if (folder / INDEX_FILE).exists() else set()
    # The checkpoint of load_pretrained is one file, which is replaced whole. Of several, a kill could leave a mixture.
    if wrong := sorted(held - (set() if of_transformers else {WEIGHTS_FILE})):
        raise ValueError(f"target {str(folder)!r} holds {wrong[0]}, of another model; name an empty folder.")


def _tensors(
    weights: _Weights,
    layout: Mapping[str, Mapping[str, Tensor]],
    new: Mapping[str, LowRankLayer],
    subspaces: Mapping[str, LayerSubspaces],
    ranks: Mapping[str, int | None],
    eight_bit: Mapping[str, Rounded],
    config: CompressionConfig,
    found: dict[str, Factors],
    progress: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in the order of the files; ``found`` receives the factors without values."""

    def layer_of(name: str) -> str | None:
        fqn = name.rpartition(".")[0]
        return fqn if fqn in new else None

    names = [name for forms in layout.values() for name in forms]
    order = dict.fromkeys(fqn for fqn in map(layer_of, names) if fqn is not None)
    factored = {fqn: ranks[fqn] for fqn in order}  # those without a rank give no factors
    factors = factorize_layers(subspaces, factored, str(config.projection), progress=progress)
    for fqn, parts in itertools.groupby(names, layer_of):
        if fqn is None:
            yield from ((name, weights.read(name)) for name in parts)
        else:
            result = next(factors)[1] if ranks[fqn] is not None else None
            empty = copy.deepcopy(new[fqn])
            result = as_stored(result, subspaces[fqn], config, eight_bit.get(fqn))
            if fqn in eight_bit:
                subspaces[fqn].release()
            if isinstance(empty, LowRankLinear) and not isinstance(empty, EightBitLinear):
                empty.dequantize_()
            assert result is not None
            layer = empty.to_empty(device="cpu").filled_with(result).state_dict()
            found[fqn] = result.to(device=torch.device("meta"))
            yield from ((name, layer[name.removeprefix(f"{fqn}.")]) for name in parts)
    next(factors, None)  # ends its progress bar
