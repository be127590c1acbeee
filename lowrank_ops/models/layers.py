"""The dense layers that can be compressed, as matrices: Linear, Conv1d, Conv2d and transformers' Conv1D."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_WITHOUT_HOOKS = (
    "load the model without device_map, or call accelerate.hooks.remove_hook_from_module(model, recurse=True)"
)
_DISPATCHED = (
    f"accelerate's hooks move its weight on each call, which only calibrate supports; to compress, {_WITHOUT_HOOKS}"
)
_DISPATCHED_EXPERTS = f"accelerate's hooks move its weights on each call; {_WITHOUT_HOOKS}"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

FilterFn = Callable[[nn.Module, str], bool]
Conv = nn.Conv1d | nn.Conv2d


class Dimensions(NamedTuple):
    """A layer as ``groups`` matrices of (out_features, in_features)."""

    groups: int
    in_features: int  # of one group: for a convolution, channels / groups * kernel height * kernel width
    out_features: int  # of one group


def find_layers(
    model: nn.Module, filter_fn: FilterFn | None = None, dispatched: bool = False
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers of ``model`` that can be compressed, and those of a supported kind that cannot.

    Args:
        model: any module.
        filter_fn: ``filter_fn(module, fqn) -> bool`` chooses layers; None chooses all.
        dispatched: also take layers whose weights accelerate's hooks move or load on each call.

    Returns:
        ``{fqn: layer}`` in the model's order and ``{fqn: reason}`` for skipped modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function filter_fn(module, fqn) -> bool, or None; got {filter_fn!r}.")
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    closed: tuple[str, ...] = ()  # prefixes of the names of modules that do not call their children
    for fqn, module in model.named_modules():
        if fqn.startswith(closed):
            continue
        if (reason := _hides_layers(module)) is not None:
            closed += (f"{fqn}." if fqn else "",)
            skipped[fqn] = reason
        elif is_supported(module):
            if filter_fn is not None and not filter_fn(module, fqn):
                continue
            reason = _reason_to_skip(module, dispatched)
            if reason is None:
                layers[fqn] = module
            else:
                skipped[fqn] = reason
        elif fused_projections(module):
            reason = reason_to_stay_fused(module)
            if reason is None and not fqn:
                reason = "the model is itself a module of fused experts; pass a module that contains it"
            if reason is not None:
                skipped[fqn] = reason
    return layers, skipped


def is_window_attention(module: nn.Module) -> bool:
    """Whether ``module`` is the attention of torchvision's Swin, which passes its weights to a function."""
    bases = type(module).__mro__
    return any(
        base.__name__ == "ShiftedWindowAttention" and base.__module__.startswith("torchvision.") for base in bases
    )


def compiled_or_scripted(module: nn.Module) -> str | None:
    """Why hooks on the children of ``module`` would not run: it is compiled or scripted. None if it is not."""
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        return "it is compiled, which hides its layers; calibrate and compress before torch.compile"
    own = vars(module).get("forward")
    if isinstance(module, torch.jit.ScriptModule) or isinstance(own, (torch.ScriptMethod, torch.ScriptFunction)):
        return "it is a TorchScript module, which hides its layers; calibrate and compress before scripting or tracing"
    return None


def _hides_layers(module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention) or is_window_attention(module):
        name = type(module).__name__ if is_window_attention(module) else "nn.MultiheadAttention"
        return (
            f"{name} applies its projections without calling a Linear; "
            "call lowrank_ops.layers.convert_attention_(model) first to compress them"
        )
    return compiled_or_scripted(module)


def check_not_wrapped(model: nn.Module) -> None:
    """Refuse to replace layers where other objects hold the old parameters.

    Raises:
        ValueError: a PEFT adapter, or a DataParallel, DistributedDataParallel or FullyShardedDataParallel module in
            ``model``.
    """
    check_no_adapters(model)
    for fqn, module in model.named_modules():
        names = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.")}
        found = names & {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
        if found:
            raise ValueError(
                f"{repr(fqn) if fqn else 'model'} is wrapped by {min(found)}, which would keep the parameters of the "
                "dense layers. Compress the module first, then wrap it, then create the optimizer."
            )


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` or one of its own parameters has hooks, which another module in its place would not have."""
    of_state = (getattr(hook, "hook", hook) for kind in _STATE_HOOKS for hook in getattr(module, kind).values())
    # remove_parametrizations and remove_spectral_norm leave some of torch's own.
    users = any(not str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.") for hook in of_state)
    of_parameters = (getattr(part, kind) for part in module.parameters(recurse=False) for kind in _PARAMETER_HOOKS)
    return users or any(getattr(module, kind) for kind in HOOKS) or any(of_parameters)


def check_not_dispatched(model: nn.Module) -> None:
    """Refuse a model whose weights accelerate's hooks move or load on each call.

    Raises:
        ValueError: a module with such hooks and parameters; the message names it and the remedy.
    """
    for fqn, module in model.named_modules():
        if hasattr(module, "_hf_hook") and module._parameters:
            raise ValueError(f"{fqn or 'model'} cannot be used as it is: {_DISPATCHED_EXPERTS}.")


def check_no_adapters(model: nn.Module) -> None:
    """Refuse a model whose layers PEFT has wrapped, because they compute more than their weights.

    Raises:
        ValueError: a layer with an adapter; the message names it.
    """
    for fqn, module in model.named_modules():
        if any(
            base.__name__ == "BaseTunerLayer" and base.__module__.startswith("peft.") for base in type(module).__mro__
        ):
            raise ValueError(
                f"layer {fqn!r} has a PEFT adapter. Merge it first, model = model.merge_and_unload(), and use the "
                "model that this returns."
            )


def _reason_to_skip(module: nn.Module, dispatched: bool) -> str | None:
    if hasattr(module, "_hf_hook") and not dispatched:
        return _DISPATCHED
    if type(module).__module__.startswith("bitsandbytes."):
        return (
            f"its weight is quantized ({type(module).__name__} of bitsandbytes); compress the float model, then "
            "quantize it"
        )
    base = next((kind for kind in _KINDS if isinstance(module, kind)), type(module))
    forward = getattr(module, "_old_forward", module.forward)  # which accelerate's hook has replaced
    if getattr(forward, "__func__", None) is not base.forward:
        return f"{type(module).__name__} overrides forward"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    weight = module.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialized yet; run the model once"
    if isinstance(weight, Tensor) and (reason := _not_plain(weight)) is not None:
        return reason
    if not isinstance(weight, nn.Parameter):
        return "its weight is recomputed in each forward pass, as by pruning or weight norm; make it a parameter first"
    return None if weight.numel() else "its weight is empty"


def _not_plain(weight: Tensor) -> str | None:
    name = type(weight).__name__
    if name == "DTensor":
        return "its weight is a DTensor; compress the whole module before it is sharded"
    given = f"its weight is a {name} of {weight.dtype}, not a plain float tensor"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"{given}; if it is quantized, compress the float model first"
    if weight.layout is not torch.strided:
        return f"its weight is sparse ({weight.layout}); make it dense first, by weight.to_dense()"
    if weight.dtype not in _DTYPES:
        return f"{given}; convert it to float32, bfloat16 or float16 first"
    return None


def fused_projections(module: nn.Module) -> tuple[str, str] | None:
    """The names of the two parameters (experts, ...) of an experts module of transformers; None for other modules.

    They are recognized by the attributes that the decorator ``use_experts_implementation`` sets. A module with further
    parameters is not recognized.
    """
    flags = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts", "_apply_gate")
    if not all(hasattr(module, flag) for flag in flags):
        return None
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    biases = [f"{name}_bias" for name in names if module.has_bias]
    own = dict(module.named_parameters(recurse=False))
    known = own.keys() == {*names, *biases} and not list(module.buffers(recurse=False))
    shaped = known and all(own[name].dim() == 3 and len(own[name]) == module.num_experts for name in names)
    return names if shaped else None


def reason_to_stay_fused(module: nn.Module) -> str | None:
    """Why experts that :func:`fused_projections` recognizes cannot be run one by one; None if they can."""
    if hasattr(module, "_hf_hook"):
        return _DISPATCHED_EXPERTS
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are distributed over processes; compress the whole module first"
    if "forward" in vars(module):
        return f"forward of this {type(module).__name__} was replaced"
    if any(getattr(module, kind) for kind in HOOKS):
        return "it has hooks, which would not run for single experts; remove them first"
    for parameter in module.parameters(recurse=False):
        if (reason := _not_plain(parameter)) is not None:
            return reason
    return None


def device_of_layer(layer: nn.Module) -> torch.device:
    """Where a layer runs: the device of its weight, or the one to which accelerate's hook moves it."""
    devices = (getattr(hook, "execution_device", None) for hook in _hooks_of(layer))
    found = next((device for device in devices if device is not None), None)
    return layer.get_parameter("weight").device if found is None else torch.device(found)


def _hooks_of(layer: nn.Module) -> Sequence[Any]:
    """accelerate's hooks."""
    hook = getattr(layer, "_hf_hook", None)
    return () if hook is None else getattr(hook, "hooks", (hook,))


def with_values(layers: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers whose weights have values, and the reason for those on the meta device."""
    reason = "its weight is on the meta device and has no values; load the weights, or call model.to_empty and load"
    without = {fqn: reason for fqn, layer in layers.items() if device_of_layer(layer).type == "meta"}
    return {fqn: layer for fqn, layer in layers.items() if fqn not in without}, without


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or inf. A finite sum, which is faster, shows that."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def check_finite(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError for the first layer whose weight or bias holds NaN or inf."""
    for fqn, layer in layers.items():
        for name, values in (("weight", weight_matrix(layer)), ("bias", bias_vector(layer))):
            if values is not None and not values.is_meta and not all_finite(values):
                raise ValueError(
                    f"layer {fqn!r}: its {name} holds NaN or inf; repair the model, or leave the layer out with "
                    "filter_fn."
                )


def unsupported_weights(model: nn.Module, known: Collection[str]) -> dict[str, str]:
    """``{fqn: reason}`` of modules of other kinds that hold matrices of their own: Embedding, LSTM, fused experts.

    Args:
        model: any module.
        known: names of modules that are reported already, with all that is in them.
    """
    total = sum(parameter.numel() for parameter in model.parameters()) or 1
    found = {}
    inside = tuple(f"{fqn}." for fqn in known if fqn)
    for fqn, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        named = fqn in known or fqn.startswith(inside)
        if not is_supported(module) and not named and any(p.dim() > 1 for p in own.values()):
            share = sum(parameter.numel() for parameter in own.values()) / total
            what, is_, holds = type(module).__name__, "is", "it holds"
            if any(True for child in module.children() for _ in child.parameters()):  # which are considered themselves
                what = f"{', '.join(own)} of {what}"
                is_, holds = ("are", "they hold") if len(own) > 1 else (is_, holds)
            found[fqn] = f"{what} {is_} not supported; {holds} {share:.1%} of the model's parameters"
    return found


def tied_layers(model: nn.Module) -> dict[str, str]:
    """``{fqn of a module: fqn of another module}`` for modules that share a parameter."""
    owners: dict[int, list[str]] = {}
    for fqn, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(fqn)
    return {
        fqn: next(other for other in holders if other != fqn)
        for holders in owners.values()
        if len(set(holders)) > 1
        for fqn in holders
    }


def is_supported(module: nn.Module) -> bool:
    """Whether layers of this kind can be compressed."""
    return isinstance(module, _KINDS) or has_transposed_weight(module)


def is_conv(module: nn.Module) -> TypeGuard[Conv]:
    """Whether ``module`` is a convolution, whose rows are the patches of its input."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d))


def has_transposed_weight(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, a linear layer with a transposed weight."""
    bases = type(module).__mro__
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in bases)


def dimensions(module: nn.Module) -> Dimensions:
    """The layer's groups and the features of one group."""
    if is_conv(module):
        in_features = module.in_channels // module.groups * math.prod(module.kernel_size)
        return Dimensions(module.groups, in_features, module.out_channels // module.groups)
    out_features, in_features = weight_matrix(module).shape[-2:]
    return Dimensions(1, in_features, out_features)


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight as (out_features, in_features), or (groups, out_features, in_features) where groups > 1."""
    weight = module.get_parameter("weight").detach()
    if is_conv(module):
        groups, in_features, out_features = dimensions(module)
        return weight.reshape(groups, out_features, in_features) if groups > 1 else weight.flatten(1)
    return weight.T if has_transposed_weight(module) else weight


def bias_vector(module: nn.Module) -> Tensor | None:
    """The bias (all out_features,), or None."""
    bias = module.bias
    if isinstance(bias, Tensor) and bias.is_meta and hasattr(module, "_hf_hook"):  # offloaded by accelerate
        bias = next(one.weights_map["bias"] for one in _hooks_of(module) if one.weights_map is not None)
    return bias.detach() if isinstance(bias, Tensor) else None


def pad_input(module: Conv, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Apply the padding that ``F.conv1d`` and ``F.conv2d`` cannot: circular, reflect, replicate, and uneven.

    Returns:
        The padded input, and the zero padding per dimension that is left for the convolution.
    """
    sides = _padding_by_side(module)
    if module.padding_mode == "zeros" and all(before == after for before, after in sides):
        return x, tuple(before for before, _ in sides)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, [size for side in reversed(sides) for size in side], mode=mode), (0,) * len(sides)


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A layer's input among the arguments of its call."""
    return args[0] if args else next(iter(kwargs.values()))


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows (rows, in_features) that a layer multiplies by its weight; for a convolution, patches of its input."""
    if not is_conv(layer):
        return x.reshape(-1, x.shape[-1])
    x, padding = pad_input(layer, x)
    return patches(layer, images(layer, x), over_images(padding, 0))


def images(layer: Conv, x: Tensor) -> Tensor:
    """A convolution's input or output as (batch, channels, height, width); of a Conv1d the width is 1."""
    x = x if x.dim() == layer.weight.dim() else x.unsqueeze(0)
    return x.unsqueeze(-1) if x.dim() == 3 else x


def over_images(sizes: Sequence[int], missing: int) -> tuple[int, int]:
    """A setting of a convolution as (height, width); for a Conv1d, ``missing`` is that of the width."""
    height, width = (*sizes, missing)[:2]
    return height, width


def patches(layer: Conv, x: Tensor, padding: tuple[int, int]) -> Tensor:
    """The patches (positions, in_features) of images (batch, channels, height, width)."""
    kernel, dilation, stride = (over_images(sizes, 1) for sizes in (layer.kernel_size, layer.dilation, layer.stride))
    return F.unfold(x, kernel, dilation, padding, stride).mT.flatten(0, 1)


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """A layer's output, or its gradient, with the features last; of a convolution (positions, channels)."""
    if not is_conv(layer):
        return y
    return images(layer, y).movedim(1, -1).flatten(0, -2)


def _padding_by_side(module: Conv) -> list[tuple[int, int]]:
    """Sizes before and after, per dimension of the positions."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        reach = [dilation * (size - 1) for dilation, size in zip(module.dilation, module.kernel_size, strict=True)]
        return [(size // 2, size - size // 2) for size in reach]
    return [(int(size), int(size)) for size in module.padding]
