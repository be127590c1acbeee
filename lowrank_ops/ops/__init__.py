"""The ops: ``covariance_update_``, its convolution form, and ``lowrank_linear``. They know nothing of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import covariance as _covariance
from . import lowrank_linear as _lowrank_linear
from ._backend import Backend, BackendUnavailableError
from .covariance import conv_covariance_update_, covariance_finalize_, covariance_update_
from .lowrank_linear import lowrank_linear

_EXPLAIN: dict[str, Callable[..., str]] = {
    "covariance_update_": _covariance.explain,
    "conv_covariance_update_": _covariance.explain_conv,
    "lowrank_linear": _lowrank_linear.explain,
}


def explain(op: str, *args: Any, **options: Any) -> str:
    """Which implementation would run a call and why the others would not, one line each.

    Args:
        op: ``"covariance_update_"``, ``"conv_covariance_update_"`` or ``"lowrank_linear"``.
        args, options: those of the call.

    Raises:
        ValueError: an unknown op, or arguments that the op would refuse.
    """
    if op not in _EXPLAIN:
        raise ValueError(f"op must be one of {', '.join(map(repr, _EXPLAIN))}; got {op!r}.")
    return _EXPLAIN[op](*args, **options)


__all__ = [
    "Backend",
    "BackendUnavailableError",
    "conv_covariance_update_",
    "covariance_finalize_",
    "covariance_update_",
    "explain",
    "lowrank_linear",
]
