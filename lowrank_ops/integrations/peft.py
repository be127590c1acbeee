"""PEFT's LoRA and DoRA on low-rank layers: which layers PEFT adapts, and how an adapter is merged into two factors.

W + B A has the factors ``[up, B]`` and ``[down; A]``, so a merge is exact and the layer stays low-rank. Importing this
module registers the layers with PEFT; ``lowrank_ops`` imports it when PEFT is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, TaskType
from peft.tuners import lora, tuners_utils
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn

from ..layers import LowRankConv1d, LowRankConv2d, LowRankLayer, LowRankLinear, PivotedLinear
from ..layers.conv import LowRankConv
from ..ranks.costs import stored_rank

_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")  # the others write to the base layer's weight


class _Adapter(lora.LoraLayer):
    """Supported variants, merge and unmerge, for linear and convolutional layers."""

    _unmerged: tuple[int, Tensor, Tensor, Tensor | None] | None = None  # rank, down, up, bias of the base layer

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        if isinstance(module, LowRankConv):
            return module.in_channels, module.out_channels
        return module.in_features, module.out_features  # type: ignore[return-value]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {variant: cls for variant, cls in super().lora_variants.items() if variant in ((), ("use_dora",))}

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Append the active adapters to the factors of the base layer.

        Args:
            safe_merge: refuse factors with NaN or inf.
            adapter_names: of the adapters; by default the active ones.

        Raises:
            RuntimeError: an adapter has a bias and the layer has none.
            ValueError: with ``safe_merge``, NaN or inf; the layer is unchanged.
        """
        for name in tuners_utils.check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._merge_one(name, safe_merge)
                self.merged_adapters.append(name)

    def _merge_one(self, name: str, safe_merge: bool) -> None:
        layer = self.get_base_layer()
        if isinstance(layer, LowRankLinear) and any(layer.formats):
            raise RuntimeError(
                f"the adapter {name!r} cannot be merged into 8-bit factors, which would be rounded again; call "
                "dequantize_() on the low-rank layers first, and lowrank_ops.layers.quantize_ afterwards. An "
                "EightBitLinear has no dequantize_; keep the adapter."
            )
        bias = None if layer.bias is None else layer.bias.data
        before = self._unmerged or (layer.rank, layer.down.data, layer.up.data, bias)
        if self.lora_bias[name] and layer.bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        down = torch.cat([layer.down[: layer.rank], self.lora_A[name].weight.to(layer.down)]).flatten(1)
        up = torch.cat([layer.up[:, : layer.rank], self.lora_B[name].weight * self.scaling[name]], 1).flatten(1)
        if self.lora_bias[name]:
            bias = bias + (self.lora_B[name].bias * self.scaling[name]).to(bias)  # type: ignore[arg-type]
        if name in self.lora_variant:
            up = up * self._dora_factor(name, before)
        up = up.to(layer.up)
        if safe_merge and not all(part.isfinite().all() for part in (down, up, bias) if part is not None):
            raise ValueError(f"NaNs detected in the merged factors. The adapter {name} seems to be broken")
        self._unmerged = before
        _set_factors(layer, down, up)
        if bias is not None:
            layer.bias.data = bias

    def _dora_factor(self, name: str, before: tuple[int, Tensor, Tensor, Tensor | None]) -> Tensor:
        """DoRA's magnitude over the norm of the adapted weight, (out_features, 1)."""
        _, down, up, _ = before
        base = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
        dora = self.lora_magnitude_vector[name]
        norm = dora.get_weight_norm(base, self.get_delta_weight(name).to(base), scaling=1)
        return dora.weight.view(-1, 1) / norm.view(-1, 1)

    def unmerge(self) -> None:
        """Restore the base layer's exact factors from before the merge."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer = self.get_base_layer()
        rank, down, up, bias = self._unmerged
        layer.rank, layer.down.data, layer.up.data = rank, down.to(layer.down), up.to(layer.up)
        if bias is not None:
            layer.bias.data = bias.to(layer.bias)
        self._unmerged = None
        self.merged_adapters.clear()


class LowRankLoraLinear(_Adapter, lora.Linear):
    """PEFT's LoRA layer around a LowRankLinear."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; arguments as in PEFT."""
        self.fan_in_fan_out = False  # also where the layer was a Conv1D
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)


class _ConvAdapter(_Adapter):
    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; arguments as in PEFT, which creates layers of the type of the base layer."""
        dense = super().get_base_layer().to_dense()
        self.get_base_layer = lambda: dense
        try:
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        finally:
            del self.get_base_layer


class LowRankLoraConv1d(_ConvAdapter, lora.layer.Conv1d):
    """PEFT's LoRA layer around a LowRankConv1d."""


class LowRankLoraConv2d(_ConvAdapter, lora.Conv2d):
    """PEFT's LoRA layer around a LowRankConv2d."""


def _set_factors(layer: LowRankLayer, down: Tensor, up: Tensor) -> None:
    """Put factors (rank, in_features) and (out_features, rank) into a layer without groups, in place."""
    out_features, in_features = len(up), down.shape[1]
    if len(down) > min(in_features, out_features):  # a product of full rank
        product = (up.double() @ down.double()).to(up)
        if out_features <= in_features:
            down, up = product, torch.eye(out_features).to(up)
        else:
            down, up = torch.eye(in_features).to(up), product
    layer.rank = len(down)
    padding = stored_rank(layer.rank) - layer.rank
    layer.down.data = F.pad(down, (0, 0, 0, padding)).reshape(-1, *layer.down.shape[1:])
    layer.up.data = F.pad(up, (0, padding)).reshape(out_features, -1, *layer.up.shape[2:])


def _check(config: PeftConfig, model: nn.Module) -> None:
    """Raise ValueError for what LoRA on low-rank layers does not support, before PEFT changes the model."""
    fields = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    variants = [name for name in fields if name != "use_dora" and getattr(config, name)]
    for fqn, module in model.named_modules():
        layer = module.get_base_layer() if isinstance(module, _Adapter) else module
        if not isinstance(layer, LowRankLayer):
            continue
        for parameter in getattr(config, "target_parameters", None) or ():
            if any(f".{fqn}.{name}".endswith(f".{parameter}") for name in ("down", "up", "bias")):
                raise ValueError(
                    f"target_parameters names {parameter!r} of the low-rank layer {fqn!r}, whose factors cannot be "
                    "adapted separately; name the layer in target_modules."
                )
        if not tuners_utils.check_target_module_exists(config, fqn):
            continue
        if isinstance(layer, PivotedLinear):
            raise ValueError(
                f"layer {fqn!r} is pivoted, which PEFT's adapters do not support; replace it by layer.to_lowrank(), or "
                "compress the model without pivoted=True."
            )
        if variants:
            raise ValueError(
                f"layer {fqn!r} is low-rank, and of PEFT's LoRA variants only use_dora is supported there; got "
                f"{', '.join(variants)}."
            )
        if config.init_lora_weights not in _INITIALIZATIONS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} needs the dense weight of layer {fqn!r}, "
                f"which is low-rank; use one of {', '.join(map(repr, _INITIALIZATIONS))}."
            )
        if isinstance(layer, LowRankConv) and (
            layer.groups > 1 or max(layer.dilation) > 1 or layer.padding_mode != "zeros"
        ):
            raise ValueError(
                f"layer {fqn!r} has groups={layer.groups}, dilation={layer.dilation} and "
                f"padding_mode={layer.padding_mode!r}, which PEFT's LoRA cannot merge. Leave the layer out of "
                "target_modules."
            )


def _all_linear(config: PeftConfig, model: nn.Module) -> set[str]:
    """The low-rank layers selected by target_modules="all-linear": all but the output layer, as for dense ones."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    heads = [get_head()]
    if config.task_type == TaskType.SEQ_CLS and heads == [None]:
        heads += [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    return {
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        and not fqn.endswith("base_layer")
        and all(module is not head for head in heads)
    }


def _register() -> None:
    resolve = tuners_utils._maybe_include_all_linear_layers

    @functools.wraps(resolve)
    def with_low_rank_layers(config: PeftConfig, model: nn.Module) -> PeftConfig:
        """Called by PEFT for every new adapter, before it changes the model."""
        targets = getattr(config, "target_modules", None)
        config = resolve(config, model)
        if isinstance(targets, str) and targets.lower() == "all-linear":
            config.target_modules |= _all_linear(config, model)
        if isinstance(config, LoraConfig):
            _check(config, model)
            given = config._custom_modules or {}
            ours = {
                LowRankLinear: LowRankLoraLinear,
                LowRankConv1d: LowRankLoraConv1d,
                LowRankConv2d: LowRankLoraConv2d,
            }
            config._register_custom_module(
                {kind: adapter for kind, adapter in ours.items() if issubclass(adapter, given.get(kind, adapter))}
            )
        return config

    tuners_utils._maybe_include_all_linear_layers = with_low_rank_layers


_register()
