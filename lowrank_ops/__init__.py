"""Low-rank layers from the subspaces that a model really uses: calibrate, measure, compress, run fast."""

from . import ops
from .calibration.calibrate import Calibrator, calibrate
from .calibration.statistics import Covariance, Covariances, NonFiniteActivationError
from .checkpoint import CheckpointError, load_pretrained, save_pretrained
from .compress import compress_
from .config import (
    AccuracyGuided,
    CompressionConfig,
    ExplainedVariance,
    FlopBudget,
    LatencyBudget,
    LayerLatencies,
    ParameterBudget,
    Ranks,
)
from .factors.factorize import Factors, factorize
from .layers import LowRankConv2d, LowRankLinear, measure_latency, replace_
from .midpoint import recalibrate
from .ranks.choose import choose_ranks
from .reconstruction.sequential import refit_factors
from .report import CompressionReport, UtilizationReport, utilization
from .report.measured_errors import measure_errors
from .subspaces.layer import LayerSubspaces, layer_subspaces
from .subspaces.principal import Subspace
from .training import FinetuneReport, finetune_

__all__ = [
    "ops",
    # calibration
    "calibrate",
    "Calibrator",
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
