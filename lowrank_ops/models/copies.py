"""Copies of a model that share its parameters, so that trials do not change the model."""

from __future__ import annotations

import copy
import dis
import functools
import gc
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ProxyTypes, ReferenceType

import torch
from torch import Tensor, nn

from .layers import FilterFn, check_not_wrapped
from .running import exclusive

_REMEDY = (
    "Searches and recalibrate run copies, so that other threads can run the model meanwhile. Use bound methods or "
    "functools.partial, which are copied with their module, instead of closures, or define __deepcopy__."
)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that shares the memory of its parameters; everything else, including buffers, is copied.

    The copy's parameters are objects of their own: ``copy.to(...)`` and new layers in the copy do not change the model.

    Raises:
        RuntimeError: another thread works on the model.
        ValueError: the model is wrapped for distributed training, its state cannot be copied, or the copy would refer
            to parts of the model; the message names the attribute.
    """
    check_not_wrapped(model)
    with exclusive(model), torch.inference_mode(False):  # parameters created in inference mode could not be trained
        memo: dict[int, Any] = {}
        for where, value in _reachable(model):
            if isinstance(value, nn.Parameter):
                if not _is_special(value):
                    memo[id(value)] = _alias(value)
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value  # which torch does not copy: a result that the model keeps
            elif type(value) in ProxyTypes:
                raise ValueError(f"model cannot be copied: {where} holds a weak proxy. {_REMEDY}")
        shared = dict(memo)
        try:
            copied = copy.deepcopy(model, memo)
        except Exception as error:
            where = _uncopyable(model, shared)
            raise ValueError(
                f"model cannot be copied: {where} raises {type(error).__name__}: {error}. {_REMEDY}"
            ) from error
    _check_parameters(model, copied)
    own = set(model.modules())
    for where, value in _reachable(copied):
        kept = isinstance(value, nn.Module) and value in own
        if kept or (id(value) not in shared and memo.get(id(value), value) is not value):
            raise ValueError(
                f"model cannot be copied: in the copy, {where} would still refer to the model's own "
                f"{type(value).__name__}. {_REMEDY}"
            )
    return copied


def filter_of_original(model: nn.Module, filter_fn: FilterFn | None) -> FilterFn | None:
    """``filter_fn`` for a copy of ``model``, called with the model's own layers: it may go by their identity."""
    if filter_fn is None:
        return None
    given, own = filter_fn, dict(model.named_modules(remove_duplicate=False))
    return lambda module, fqn: given(own.get(fqn, module), fqn)


def _is_special(parameter: nn.Parameter) -> bool:
    """Whether a parameter has its own class, as uninitialized and quantized ones have; these are copied."""
    return type(parameter) is not nn.Parameter and issubclass(type(parameter), nn.Parameter)


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter in the same memory."""
    alias = nn.Parameter(parameter.detach(), parameter.requires_grad and not parameter.is_inference())
    vars(alias).update(vars(parameter))
    return alias


def _reachable(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every object that a model refers to, with the attribute; of classes, only what ``forward`` reads."""
    names = {module: fqn for fqn, module in model.named_modules()}
    seen: dict[int, Any] = {}
    left: list[tuple[str, Any]] = [("model", model)]
    while left:
        where, value = left.pop()
        if id(value) in seen or isinstance(value, (type, ModuleType)):
            continue
        seen[id(value)] = value
        yield where, value
        if type(value) in ProxyTypes:
            continue
        if isinstance(value, nn.Module):
            fqn = names.get(value, f"a {type(value).__name__}") or "model"
            left.append((f"{fqn}.forward", type(value).forward))
            left += [(f"{fqn}.{name}", part) for name, part in dict(vars(value)).items() if name != "extra_repr"]
        elif isinstance(value, ReferenceType):
            left.append((where, value()))
        elif isinstance(value, FunctionType):
            held = [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, vars(value)]
            left += [(where, part) for part in [*held, *_globals_of(value)]]
        elif not isinstance(value, Tensor):
            left += [(where, part) for part in gc.get_referents(value) if gc.is_tracked(part)]


def _globals_of(function: FunctionType) -> list[Any]:
    """The globals that a function reads: modules, methods, containers, and functions of its own file.

    A notebook that replaces a forward, ``run = layer.forward; layer.forward = lambda x: 2 * run(x)``, refers to the
    model's layer in this way.
    """
    found = [function.__globals__.get(name) for name in _global_names(function.__code__)]
    kinds = (nn.Module, MethodType, functools.partial, dict, list, set, tuple)
    return [
        part
        for part in found
        if isinstance(part, kinds) or (isinstance(part, FunctionType) and part.__globals__ is function.__globals__)
    ]


@functools.lru_cache(1024)
def _global_names(code: CodeType) -> frozenset[str]:
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return frozenset(own).union(*(_global_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _check_parameters(model: nn.Module, copied: nn.Module) -> None:
    """Raise ValueError if a ``__deepcopy__`` of the user's has made other parameters."""
    before, after = (dict(one.named_parameters(remove_duplicate=False)) for one in (model, copied))
    for fqn in before | after:
        x, y = before.get(fqn), after.get(fqn)
        if x is None or y is None or not _same(x, y):
            raise ValueError(f"model cannot be copied: copy.deepcopy returns another parameter {fqn!r}. {_REMEDY}")


def _same(x: nn.Parameter, y: nn.Parameter) -> bool:
    if not all(type(one) is nn.Parameter and type(one.data) is Tensor for one in (x, y)):
        return type(x) is type(y)
    return x.data_ptr() == y.data_ptr() or torch.equal(x, y)


def _uncopyable(model: nn.Module, shared: dict[int, Any]) -> str:
    """The first attribute that cannot be copied."""
    modules = {id(module): module for module in model.modules()}
    for fqn, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                copy.deepcopy(value, {**shared, **modules})
            except Exception:
                return f"{fqn or 'model'}.{name}"
    return "model"
