"""Low-rank layers from the subspaces that a model really uses: calibrate, measure, compress, run fast."""

from . import ops
from .calibration import calibrate, calibration
from .checkpoint import CheckpointError, load_pretrained, save_pretrained
from .compress import compress_
from .config import (
    AccuracyGuided,
    CompressionConfig,
    ExplainedVariance,
    FlopBudget,
    LatencyBudget,
    ParameterBudget,
    Ranks,
)
from .covariances import Covariance, Covariances, NonFiniteActivationError
from .decomposition import Subspace
from .errors import measure_errors
from .factors import Factors, factorize
from .finetune import FinetuneReport, finetune_
from .latencies import LayerLatencies
from .layers import LowRankConv2d, LowRankLinear
from .ranks import choose_ranks
from .recalibration import recalibrate
from .refit import refit_factors
from .replacement import replace_
from .report import CompressionReport, UtilizationReport, utilization
from .subspaces import LayerSubspaces, layer_subspaces
from .timing import measure_latency

__all__ = [
    "ops",
    # calibration
    "calibrate",
    "calibration",
    "recalibrate",
    "Covariance",
    "Covariances",
    "NonFiniteActivationError",
    # subspaces and utilization
    "layer_subspaces",
    "LayerSubspaces",
    "Subspace",
    "utilization",
    "UtilizationReport",
    # ranks
    "choose_ranks",
    "ExplainedVariance",
    "ParameterBudget",
    "FlopBudget",
    "LatencyBudget",
    "LayerLatencies",
    "measure_latency",
    "AccuracyGuided",
    "Ranks",
    # factors and replacement
    "CompressionConfig",
    "CompressionReport",
    "compress_",
    "measure_errors",
    "Factors",
    "factorize",
    "refit_factors",
    "LowRankConv2d",
    "LowRankLinear",
    "replace_",
    # recovering accuracy
    "finetune_",
    "FinetuneReport",
    # checkpoints
    "CheckpointError",
    "load_pretrained",
    "save_pretrained",
]
from .version import __version__ as __version__
