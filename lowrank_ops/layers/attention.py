"""Attention modules that call their projections as layers, which can then be calibrated and compressed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import check_not_dispatched, check_not_wrapped, has_hooks, is_window_attention, tied_layers
from .replace import swap_

_HOOKED = "it has hooks, which would be lost; remove them first"


class SeparateAttention(nn.Module):
    """A drop-in for ``nn.MultiheadAttention`` with the Linears ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    Same arguments, masks and outputs. There is no fast path: modules that look for one, such as
    ``nn.TransformerEncoderLayer``, call this module.

    Args:
        attention: its parameters are taken over; not changed.
    """

    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: None
    in_proj_bias: None  # nn.TransformerEncoderLayer takes no fast path without it
    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
            setattr(self, name, getattr(attention, name))
        self._qkv_same_embed_dim = False
        self.in_proj_weight, self.in_proj_bias = None, None
        if attention._qkv_same_embed_dim:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.register_parameter("bias_k", attention.bias_k)  # type: ignore[arg-type]
        self.register_parameter("bias_v", attention.bias_v)  # type: ignore[arg-type]
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,  # (batch, L, embed_dim) if batch_first, else (L, batch, embed_dim); or (L, embed_dim)
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,  # (batch, S), true or -inf where a key is not attended to
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # (L, S) or (batch * num_heads, L, S)
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask; pass attn_mask as well.")
        batched = query.dim() == 3
        if not batched or not self.batch_first:
            # Equal arguments stay one tensor, so that a calibration counts it once.
            dim = 0 if batched else -1
            q, k = _batch_first(query, dim), _batch_first(key, dim)
            v = k if value is key else _batch_first(value, dim)
            query, key, value = q, q if key is query else k, q if value is query else v
            if not batched and key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        batch, length, _ = query.shape
        if list(key.shape[:2]) != [batch, key.shape[1]] or list(value.shape[:2]) != list(key.shape[:2]):
            raise ValueError(
                f"query, key and value must be of one batch, and key and value of one length; batch first they are "
                f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}."
            )
        if key_padding_mask is not None and list(key_padding_mask.shape) != list(key.shape[:2]):
            raise ValueError(
                f"key_padding_mask must have shape {list(key.shape[:2])}, batch and keys; got "
                f"{list(key_padding_mask.shape)}."
            )
        if attn_mask is not None:
            two = [length, key.shape[1]]
            three = [batch * self.num_heads, length, key.shape[1]]
            if list(attn_mask.shape) != two and list(attn_mask.shape) != three:
                raise ValueError(f"attn_mask must have shape {two} or {three}; got {list(attn_mask.shape)}.")
        # As in torch: the hint replaces the mask where nothing else has to be masked and no weights are returned.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask: Tensor | None = None
        if attn_mask is not None and not is_causal:
            mask = _additive(attn_mask, query)
        if mask is not None:
            mask = mask.unflatten(0, (batch, self.num_heads)) if mask.dim() == 3 else mask[None, None]
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, query)[:, None, None]
            mask = padding if mask is None else mask + padding

        k, v = self.k_proj(key), self.v_proj(value)
        extra = 0
        bias_k, bias_v = self.bias_k, self.bias_v
        if bias_k is not None and bias_v is not None:
            k = torch.cat([k, bias_k.expand(batch, -1, -1)], 1)
            v = torch.cat([v, bias_v.expand(batch, -1, -1)], 1)
            extra += 1
        if self.add_zero_attn:
            k, v, extra = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), extra + 1
        if extra and mask is not None:
            mask = F.pad(mask, (0, extra))
        q, k, v = self._heads(self.q_proj(query)), self._heads(k), self._heads(v)

        dropout = float(self.dropout) if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, batch_first={self.batch_first}"


class WindowAttention(nn.Module):
    """torchvision's ``ShiftedWindowAttention`` (Swin, also version 2), whose ``qkv`` and ``proj`` are called as layers.

    Its own forward runs; where it passes the weight of a projection to ``F.linear``, the projection is called.

    Args:
        attention: holds the parameters, buffers and modules that this module takes over.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        containers = {name: dict(vars(attention)[name]) for name in ("_parameters", "_buffers", "_modules")}
        vars(self).update(vars(attention) | containers)
        self.replaced = type(attention)
        if hasattr(attention, "logit_scale") and attention.qkv.bias is not None:
            keys = attention.qkv.bias.detach().chunk(3)[1]
            keys.zero_()  # version 2 ignores the bias of the keys

    def forward(self, x: Tensor) -> Tensor:  # (batch, height, width, channels), also the result
        result: Tensor = self.replaced.forward(_CallsProjections(self), x)
        return result


class _CallsProjections:
    """A WindowAttention as the forward of torchvision's class sees it."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.qkv, self.proj = _Called(attention.qkv), _Called(attention.proj)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.attention.replaced, name, None)
        return getattr(self.attention, name) if method is None else partial(method, self)


class _Called:
    """Stands for a projection and for its weight: ``F.linear`` with it calls the layer, which adds its own bias."""

    bias = None

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        self.layer = layer

    @property
    def weight(self) -> "_Called":
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, weight, *_ = args
        if func is not F.linear or not isinstance(weight, cls):
            return NotImplemented
        return weight.layer(x)


def convert_attention_(model: nn.Module) -> nn.Module:
    """Put a :class:`SeparateAttention` in place of every ``nn.MultiheadAttention`` of ``model``, in place.

    ``nn.MultiheadAttention`` applies its projections without calling a Linear, so they can be neither calibrated nor
    compressed. Convert the model first, then calibrate. The attention of torchvision's Swin, which does the same,
    becomes a :class:`WindowAttention` with the same state dict. The outputs equal those of torch without its fast path,
    up to rounding; all arguments, masks, ``kdim``, ``vdim``, ``bias_kv`` and ``add_zero_attn`` keep their meaning. An
    error leaves the model unchanged.

    In the state dict, ``in_proj_weight`` becomes ``q_proj.weight``, ``k_proj.weight`` and ``v_proj.weight``, and
    ``in_proj_bias`` likewise. Load checkpoints of the original model before the conversion, and those of a compressed
    model after it. The parameters are new: create the optimizer afterwards.

    Args:
        model: any module.

    Returns:
        ``model``, or the new module where ``model`` is itself an attention; unchanged if there is none.

    Raises:
        ValueError: an attention that overrides ``forward``, has hooks or parametrized, quantized or tied weights, or a
            model that is wrapped for distributed training, dispatched by accelerate or has PEFT adapters; the message
            names it.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        >>> model = lro.layers.convert_attention_(model)
        >>> list(lro.calibrate(model, [torch.randn(8, 16, 64)]))[:4]
        ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'self_attn.out_proj']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    check_not_wrapped(model)
    check_not_dispatched(model)
    tied = tied_layers(model)
    found = {
        module: fqn
        for fqn, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or is_window_attention(module)
    }
    for attention, fqn in found.items():
        if (reason := _reason_to_keep(attention, tied.get(fqn) or tied.get(f"{fqn}.out_proj".lstrip(".")))) is not None:
            raise ValueError(f"{fqn or 'model'} is a {type(attention).__name__} that cannot be converted: {reason}.")
    converted: dict[nn.Module, nn.Module] = {
        attention: SeparateAttention(attention)
        if isinstance(attention, nn.MultiheadAttention)
        else WindowAttention(attention)
        for attention in found
    }
    swap_(model, converted)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(part in module.modules() for part in converted.values()):
            module.use_nested_tensor = False  # only the fast path of its layers takes nested tensors
    return converted.get(model, model)


def _reason_to_keep(attention: nn.Module, tied: str | None) -> str | None:
    if not isinstance(attention, nn.MultiheadAttention):
        if not type(attention).forward.__module__.startswith("torchvision.") or "forward" in vars(attention):
            return "it overrides forward"
        return _HOOKED if has_hooks(attention) else None
    if getattr(attention.forward, "__func__", None) is not nn.MultiheadAttention.forward:
        return "it overrides forward"
    if tied is not None:
        return f"a weight is tied to {tied!r}"
    names = ["in_proj_weight"] if attention._qkv_same_embed_dim else [f"{name}_proj_weight" for name in "qkv"]
    own = [getattr(attention, name) for name in names] + [attention.out_proj.weight]
    if any(type(weight) is not nn.Parameter for weight in own):
        return "its weights are not plain parameters, as by a parametrization, pruning or quantization; undo that first"
    if has_hooks(attention) or has_hooks(attention.out_proj):
        return _HOOKED
    return None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with copies of these tensors; parameters are used without a copy."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = _parameter(weight)
    if bias is not None:
        linear.bias = _parameter(bias)
    return linear


def _parameter(values: Tensor) -> nn.Parameter:
    if isinstance(values, nn.Parameter):
        return values
    with torch.inference_mode(False):
        return nn.Parameter(values.detach().clone(), values.requires_grad)


def _batch_first(x: Tensor, dim: int) -> Tensor:
    """Transpose (positions, batch, features), or add a batch to (positions, features) where ``dim`` is -1."""
    return x.unsqueeze(0) if dim < 0 else x.transpose(0, 1)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to add to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"masks must be bool or float; got {mask.dtype}.")
    return mask
