"""Argument checks for public functions: types by their annotations, and arguments that would have no effect.

These run before the function body. Values, such as ranges and names, are checked in the body, by the functions here.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import reprlib
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

Function = TypeVar("Function", bound=Callable[..., Any])

_Union = (Union, types.UnionType)
_NONE = type(None)
_BY_TYPE: dict[Any, str] = {
    _NONE: "None",
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a pathlib.Path",
    Tensor: "a tensor",
    nn.Module: "a torch.nn.Module",
    torch.dtype: "a torch.dtype",
    torch.device: "a torch.device",
}
# By argument name, what follows "must" in the message where the type is not enough. A name has one meaning everywhere.
_BY_NAME = {
    "backend": "be 'auto', 'unverified', 'reference', 'triton' or 'cuda'",
    "batches": "be a collection of batches, such as a list or a DataLoader",
    "blocks": "be the name of a module, a sequence of such names, or None",
    "by": "be 'budget' or 'layers'",
    "covariances": "come from calibrate(model, batches) or Covariances.load(path)",
    "errors": "come from measure_errors: a mapping {fqn: relative error}",
    "evaluate": "be a function evaluate(model) that returns a number",
    "filter_fn": "be a function filter_fn(module, fqn) -> bool, or None",
    "forward": "be a function forward(model, batch), or None",
    "loss": "be a function loss(output, batch), or None",
    "mask": "be the name of an argument of the model's forward, a function mask(args, kwargs), a mapping of these by "
    "the names of modules, or None",
    "match": "be a sequence of module names, such as ['blocks.0']",
    "other": "come from calibrate(model, batches) or Covariances.load(path)",
    "reconstruction": "be a SequentialReconstruction(batches), a BlockReconstruction(batches), or None",
    "report": "come from compress_, or be None",
    "sensitivity": "be 'fisher', 'output', 'pooled', a function loss(output, batch), or None",
    "side": "be 'auto', 'input', 'output' or 'smaller'",
    "statistics": "be the LayerStatistics of this layer, such as covariances['name'], or None",
    "subspaces": "come from layer_subspaces(layers, covariances), or be None",
}  # fmt: skip


def checked(**needs: str) -> Callable[[Function], Function]:
    """A decorator that checks the arguments of each call by the annotations of the function.

    Args:
        needs: ``argument="other"``: ``argument`` has no effect without ``other``, so without it ``argument`` must
            have its default.

    Returns:
        The decorator. The decorated function raises TypeError for an argument of a wrong type and ValueError for one
        that would be ignored. The message has the argument's name and what is accepted.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not is_compiling():
                try:
                    given = signature.bind(*args, **kwargs).arguments
                except TypeError:  # a missing or unknown argument: Python's own message is clear
                    return function(*args, **kwargs)
                check_arguments(function, given)
                for name, other in needs.items():
                    default, without = signature.parameters[name].default, given.get(other) in (None, (), [])
                    if without and given.get(name, default) != default:
                        raise ValueError(f"{name} has no effect without {other}; pass {other}, or leave {name} out.")
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def check_arguments(function: Any, given: Mapping[str, Any]) -> None:
    """Raise TypeError for the first argument whose type is not that of its annotation.

    Args:
        function: a function or a dataclass with annotations.
        given: ``{name: value}``; names without an annotation are not checked.
    """
    hints = _hints(function)
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            wrong = [other for other in given if other in hints and not _fits(given[other], hints[other])]
            swapped = [
                f"{name} and {other} are swapped: "
                for other in wrong
                if _fits(value, hints[other]) and _fits(given[other], hints[name])
            ]
            raise TypeError("".join(swapped[:1]) + _message(name, value, hints[name]))
        if isinstance(value, str) and Path in get_args(hints.get(name)) and (not value or "\0" in value):
            raise ValueError(f"{name} must name a file or folder; got {value!r}.")


def check_positive(**values: float) -> None:
    """Raise ValueError for the first value that is not positive and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive{' and finite' * (value == math.inf)}; got {value!r}.")


def check_share(name: str, value: float) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is in (0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:
        raise (ValueError if number else TypeError)(f"{name} must be a number in (0, 1]; got {value!r}.")


def check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    """Raise TypeError unless ``value`` is a string or None, ValueError unless it is among the accepted names."""
    named = value is None or isinstance(value, str)
    if not named or value not in accepted:
        raise (ValueError if named else TypeError)(
            f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}."
        )


def check_names(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a mapping with strings for keys, names or patterns of layers."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f'{name} must be a mapping {{fqn or "re:pattern": rank}} with strings for keys; got {value!r}.')


@functools.cache
def _hints(function: Any) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(function).items() if name != "return"}


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if origin in _Union:
        return any(_fits(value, part) for part in args)
    if hint is int or hint is float:
        numbers = (int, torch.SymInt) if hint is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, os.PathLike)
    if hint is Tensor:
        return isinstance(value, Tensor) or hasattr(type(value), "__torch_function__")
    if origin is Callable:  # a module is callable, but is not a function of a model
        of_model = isinstance(args[0], list) and nn.Module in args[0]
        return callable(value) and not (of_model and isinstance(value, nn.Module))
    if origin is Iterable:
        return _is_collection(value)
    if origin is Mapping:
        plain = not get_args(args[1])  # else the function says which item is wrong
        fits = isinstance(value, Mapping)
        return fits and (not plain or all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items()))
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(v, args[0]) for v in value)
    if origin is tuple:
        return isinstance(value, tuple)
    return isinstance(value, origin or hint)


def _is_collection(value: Any) -> bool:
    """Whether ``value`` is iterable and is not itself one batch."""
    return not _is_one_batch(value) and any(hasattr(type(value), name) for name in ("__iter__", "__getitem__"))


def _is_one_batch(value: Any) -> bool:
    one = (Tensor, Mapping, str, bytes, nn.Module, nn.utils.rnn.PackedSequence)
    return isinstance(value, one) or hasattr(value, "__array_interface__")


def _message(name: str, value: Any, hint: Any) -> str:
    given = _shown(value)
    if name == "batches" and _is_one_batch(value):
        given = f"one {type(value).__name__}. Pass [batch] for a single one"
    elif isinstance(value, type) or (callable(value) and name == "batches"):
        given = f"{given}. Call it, and pass the result"
    accepted = _BY_NAME.get(name) if hint is not Tensor else None  # a loss may be a function or its value
    return f"{name} must {accepted or f'be {_described(hint)}'}; got {given}."


def _described(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in _Union:
        words = list(map(_described, args))
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if hint in _BY_TYPE:
        return _BY_TYPE[hint]
    if origin is Callable:
        return "a function"
    if origin is Mapping:
        return f"a mapping {{name: {_described(args[1])}}}"
    if origin is Sequence:
        return f"a sequence, each {_described(args[0])}"
    of_torch = issubclass(hint, nn.Module) and hint.__module__.startswith("torch.")
    return _with_article(f"torch.nn.{hint.__name__}" if of_torch else hint.__name__)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def _shown(value: Any) -> str:
    """The repr of a plain value; of others the type, and for a collection the types of its items."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return reprlib.repr(value)
    if isinstance(value, type) or inspect.isroutine(value):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
    if isinstance(value, Collection) and isinstance(value, (list, tuple, dict)) and value:
        parts = value.items() if isinstance(value, dict) else [(value_of,) for value_of in value]
        inside = dict.fromkeys(": ".join(type(part).__name__ for part in item) for item in parts)
        return f"{_with_article(type(value).__name__)} of {', '.join(list(inside)[:3])}"
    return type(value).__name__
