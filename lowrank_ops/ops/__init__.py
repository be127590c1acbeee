"""The ops: ``covariance_update_``, its convolution form, and ``lowrank_linear``. They know nothing of models."""

from ._backend import Backend, BackendUnavailableError
from .covariance import conv_covariance_update_, covariance_finalize_, covariance_update_
from .lowrank_linear import lowrank_linear

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "conv_covariance_update_",
    "covariance_finalize_",
    "covariance_update_",
    "lowrank_linear",
]
