"""The ops: ``lowrank_linear``, also for groups and experts, ``covariance_update_``, also for convolutions.

Independent of the rest of the package. One folder per op: ``reference.py`` is plain PyTorch, ``_triton*.py`` and
``_cuda.py`` are kernels, and ``__init__.py`` lists them in the ``TABLE`` from which ``_backend.choose`` picks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..arguments import checked
from . import covariance as _covariance
from . import experts as _experts
from . import grouped as _grouped
from . import linear as _linear
from ._backend import Backend, BackendUnavailableError
from ._decompositions import decompositions
from .covariance import conv_covariance_update_, covariance_finalize_, covariance_update_
from .experts import lowrank_experts
from .grouped import lowrank_linear_grouped
from .linear import lowrank_linear

_EXPLAIN: dict[str, Callable[..., str]] = {
    "covariance_update_": _covariance.explain,
    "conv_covariance_update_": _covariance.explain_conv,
    "lowrank_experts": _experts.explain,
    "lowrank_linear": _linear.explain,
    "lowrank_linear_grouped": _grouped.explain,
}


@checked()
def explain(op: str, *args: Any, **options: Any) -> str:
    """Explain which implementation runs a call, and why each other one does not.

    Args:
        op: ``"covariance_update_"``, ``"conv_covariance_update_"``, ``"lowrank_experts"``, ``"lowrank_linear"`` or
            ``"lowrank_linear_grouped"``.
        args, options: those of the call. Nothing is computed or changed.

    Returns:
        One line per implementation: ``"<name>: runs"``, ``"<name>: can run"`` or ``"<name>: cannot run: <reason>"``. A
        CUDA kernel that can run the call is named with its tiles. A kernel that ``"auto"`` avoids, because its first
        call in this process was wrong, is marked.

    Raises:
        ValueError: an unknown op, or arguments that the op refuses.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> x, down, up = torch.randn(5, 64), torch.randn(8, 64), torch.randn(32, 8)
        >>> lines = lro.ops.explain("lowrank_linear", x, down, up).splitlines()
        >>> lines[0]
        'dense: can run'
        >>> lines[-1]
        'two_products: runs'
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
    "decompositions",
    "explain",
    "lowrank_experts",
    "lowrank_linear",
    "lowrank_linear_grouped",
]
