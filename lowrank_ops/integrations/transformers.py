"""transformers: ``save_pretrained`` and ``from_pretrained`` of models with low-rank layers, and their model card.

``config.json`` gets a ``quantization_config`` with the method "lowrank", which describes the layers as
``lowrank_config.json`` does. When a model is loaded, its empty dense layers are replaced by low-rank ones; transformers
then loads their tensors like all others: sharded, offloaded, in any dtype. The loaded model counts as a float model, so
transformers' restrictions of quantized models do not apply.

Importing this module registers it with transformers; ``lowrank_ops`` imports it when transformers is imported.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..description import CheckpointError, check_format, describe_layers, empty_layers
from ..layers._base import LowRankLayer
from ..layers.eight_bit import EightBitLinear
from ..layers.linear import LowRankLinear
from ..layers.narrow import NarrowLinear
from ..layers.pivoted import PivotedLinear, is_order
from ..layers.plain import CONVERTED
from ..layers.replace import swap_
from ..layers.weight import ProductWeight
from ..models.experts import ListedExperts, experts_listed
from ..models.running import shortened
from ..version import __version__

METHOD = "lowrank"
# transformers only warns of an unknown quantization method, then loads random weights. An unknown fusion is an error.
REQUIRED = "lowrank_ops (install this package, and import it before the model is loaded)"


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a saved model: the layers as ``lowrank_config.json`` describes them.

    Args:
        layers: ``{fqn: kind, sizes, rank and bias}`` of the low-rank layers.
        format, version: of the description, as in ``lowrank_config.json``.
        quant_method: "lowrank".

    Raises:
        CheckpointError: a description of another format or of a newer version.
    """

    layers: Mapping[str, Any]

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        format: str | None = None,
        version: int | None = None,
        quant_method: str = METHOD,
        **other: Any,
    ) -> None:
        vars(self).update(layers=layers, format=format, version=version, quant_method=quant_method)
        check_format("config.json", self.to_dict())


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the low-rank layers of a saved model in place of the dense ones, before their tensors are loaded."""

    quantization_config: LowRankConfig
    requires_calibration = True  # from_pretrained refuses to apply a LowRankConfig to a dense checkpoint
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layers = self.quantization_config.layers
        with experts_listed(model, {name for fqn in layers for name in _choices(model, fqn)}):
            swap_(model, empty_layers(model, _names_in(model, layers)))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        unloaded = [
            f"{fqn}.{name}"
            for fqn in _names_in(model, self.quantization_config.layers)
            for name, tensor in model.get_submodule(fqn).state_dict(keep_vars=True).items()
            if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if unloaded:
            raise CheckpointError(f"the checkpoint lacks {', '.join(unloaded)}; save the model again.")
        for fqn, module in model.named_modules():
            if isinstance(module, LowRankLinear):
                module.follow_dtype_()
            if isinstance(module, PivotedLinear) and not module.order.is_meta and not is_order(module.order):
                raise CheckpointError(f"{fqn}.order of the checkpoint is not a permutation; save the model again.")
        # An ordinary float model, which may be cast, trained and saved as such.
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        return model


def _names_in(model: Any, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The layers by their names in ``model``, which may lack or add the head of the saved model."""
    modules = dict(model.named_modules())
    same_class = type(model).__name__ in (model.config.architectures or [])
    names = {}
    for fqn, entry in entries.items():
        name = next((name for name in _choices(model, fqn) if name in modules), fqn)
        if name in modules or same_class:
            names[name] = entry  # a missing layer of another class, such as its head, is listed by transformers
    return names


def _choices(model: Any, fqn: str) -> tuple[str, str, str]:
    prefix = f"{model.base_model_prefix}."
    return fqn, prefix + fqn, fqn.removeprefix(prefix)


def _describe(model: PreTrainedModel) -> None:
    """Describe the low-rank layers of ``model`` in its configuration; without any, remove an old description."""
    config = model.config
    given = getattr(config, "quantization_config", None)
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    fusions = dict(getattr(config, "fusion_config", None) or {})
    fusions.pop(REQUIRED, None)
    description = describe_layers(model)
    if description["layers"]:
        if method not in (None, METHOD):
            raise ValueError(
                f"the model has low-rank layers and is quantized by {method}; transformers can save only one of the "
                "two. Use lowrank_ops.save_pretrained, or save the model before it is quantized."
            )
        for name, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
            if name.removesuffix(".weight") in description["layers"]:
                raise ValueError(
                    f"the layer of {name!r} is low-rank, but transformers would tie it to {other!r} when the model is "
                    "loaded. Set model.config.tie_word_embeddings = False before saving."
                )
        config.quantization_config = LowRankConfig(**description)
        fusions[REQUIRED] = False
    elif method == METHOD:
        del config.quantization_config
    if fusions:
        config.fusion_config = fusions
    elif hasattr(config, "fusion_config"):
        del config.fusion_config


def class_of(folder: str | Path) -> tuple[type[PreTrainedModel], Any]:
    """The class of a saved model, and its configuration; no code of the folder runs.

    Raises:
        ValueError: the configuration names no model of transformers.
    """
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architecture = (config.architectures or [None])[0]
    kind = getattr(transformers, architecture or "", None)
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise ValueError(
            f"{str(folder)!r}: its config.json names no transformers class (architectures: {config.architectures}); "
            "load the model in a function of your own (module:function on the command line)"
        )
    return kind, config


def empty_model(folder: str | Path, forms: Mapping[str, Tensor]) -> PreTrainedModel:
    """A saved model on the meta device, with the dtypes of its files; tied weights are tied.

    Args:
        folder: of the model.
        forms: the tensors of its files, on the meta device.

    Raises:
        ValueError: as for :func:`class_of`; the model is quantized or compressed already; or its tensors do not fit it.
    """
    kind, config = class_of(folder)
    if (given := getattr(config, "quantization_config", None)) is not None:
        method = given.get("quant_method") if isinstance(given, dict) else given.quant_method
        raise ValueError(f"the model in {str(folder)!r} is quantized or compressed ({method}); pass the dense model.")
    with torch.device("meta"):
        model = kind(config)
    try:
        model.load_state_dict(forms, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the tensors in {str(folder)!r} do not fit its config.json: {error}") from None
    model.tie_weights()
    return model


def description(model: nn.Module) -> dict[str, Any]:
    """The config.json of a transformers model with low-rank layers.

    Raises:
        ValueError: transformers would tie the weight of a low-rank layer.
    """
    assert isinstance(model, PreTrainedModel)
    _describe(model)
    return dict(json.loads(model.config.to_json_string()))


def _check_copy(model: PreTrainedModel) -> None:
    """Refuse a copy without low-rank layers whose tensors ``from_pretrained`` would drop or draw at random."""
    if not any(CONVERTED in vars(module) for module in model.modules()):
        return
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in type(model)(model.config).state_dict().items()}
    # Of a copy that was compressed again; config.json describes them.
    kinds = (LowRankLayer, NarrowLinear, ListedExperts)
    described = tuple(f"{fqn}." for fqn, module in model.named_modules() if isinstance(module, kinds))
    unknown = [
        name
        for name, tensor in model.state_dict().items()
        if not name.startswith(described) and shapes.get(name) != tensor.shape
    ]
    if unknown:
        raise ValueError(
            f"{type(model).__name__}.from_pretrained would not load {shortened(unknown)}, which to_dense_layers or "
            "to_plain_layers has made. Save the compressed model itself; or, for a dense copy without new biases, "
            "compress with CompressionConfig(..., centered=False) and call to_dense_layers."
        )


def _register() -> None:
    try:
        from transformers.fusion_mapping import _FUSION_REGISTRY, ModuleFusionSpec
    except ImportError:
        pass  # a transformers without fusions ignores the entry
    else:
        _FUSION_REGISTRY[REQUIRED] = ModuleFusionSpec()

    # Initializers run after loading, on every tensor without this flag; some write to the weights of child modules.
    ProductWeight._is_hf_initialized = True  # type: ignore[attr-defined]

    save_pretrained = PreTrainedModel.save_pretrained

    @functools.wraps(save_pretrained)
    def save(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        _check_copy(self)
        _describe(self)
        return save_pretrained(self, *args, **kwargs)

    # transformers has no hook that runs before the configuration is written, unless a model was loaded as quantized.
    PreTrainedModel.save_pretrained = save  # type: ignore[method-assign]


def model_card(model: nn.Module) -> str:
    """A section of a model card, in Markdown: number, parameters and ranks of the low-rank layers of ``model``.

    Dense layers with 8-bit weights and layers with fewer channels are counted on lines of their own.

    Raises:
        ValueError: ``model`` has none of them.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> from lowrank_ops.integrations.transformers import model_card
        >>> print(model_card(torch.nn.Sequential(lro.LowRankLinear(64, 32, rank=8))))
        ## Low-rank layers
        <BLANKLINE>
        - Layers that are products of two low-rank factors, by `lowrank_ops` ...: 1
        - Their parameters: 800, 38.5% of the 2,080 of the dense layers that they replace
        - Their ranks: 8 to 8, median 8; `config.json` lists them
        ...
    """
    found = [layer for layer in model.modules() if isinstance(layer, LowRankLayer)]
    layers = [layer for layer in found if not isinstance(layer, EightBitLinear)]
    narrow = [layer for layer in model.modules() if isinstance(layer, NarrowLinear)]
    if not found and not narrow:
        raise ValueError("model has no low-rank layers to describe; call compress_ first.")
    lines = []
    if layers:
        held = sum(parameter.numel() for layer in layers for parameter in layer.parameters(recurse=False))
        dense = sum(layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel()) for layer in layers)
        ranks = sorted(layer.rank for layer in layers)
        lines = [
            f"- Layers that are products of two low-rank factors, by `lowrank_ops` {__version__}: {len(layers)}",
            f"- Their parameters: {held:,}, {held / dense:.1%} of the {dense:,} of the dense layers that they replace",
            f"- Their ranks: {ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}; `config.json` lists them",
        ]
    if len(found) > len(layers):
        rounded = len(found) - len(layers)
        lines.append(f"- Dense layers with 8-bit weights, by `lowrank_ops` {__version__}: {rounded}")
    if narrow:
        held = sum(layer.weight.numel() for layer in narrow)
        dense = sum(math.prod(layer.dense_features) for layer in narrow)
        lines.append(
            f"- Layers of MLPs with fewer channels, by `lowrank_ops` {__version__}: {len(narrow)}, with "
            f"{held / dense:.1%} of the {dense:,} elements of their dense weights"
        )
    text = "\n".join(lines)
    return f"""\
## Low-rank layers

{text}

Loading needs the package:

```python
import lowrank_ops
from transformers import {type(model).__name__}

model = {type(model).__name__}.from_pretrained("...")
```
"""


_register()
