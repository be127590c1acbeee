"""Compress PyTorch models to the subspaces they use: calibrate, measure, compress, run on fused low-rank layers."""

from . import ops
from .calibration import Calibrator, Covariances, NonFiniteActivationError, calibrate, plan_calibration
from .checkpoint import CheckpointError, load_pretrained, save_pretrained
from .compress import compress_
from .config import CompressionConfig
from .correction import correct_predictions
from .layers import LowRankConv2d, LowRankLinear, measure_latency
from .midpoint import recalibrate
from .policies import ByteBudget, ExplainedVariance, FlopBudget, LatencyBudget, ParameterBudget, Ranks
from .reconstruction import BlockReconstruction, SequentialReconstruction
from .report import utilization
from .report.measured_errors import measure_errors
from .search import measured_ranks, search_ranks
from .training import finetune_

__all__ = [
    "ops",
    # statistics
    "calibrate",
    "plan_calibration",
    "Calibrator",
    "recalibrate",
    "correct_predictions",
    "Covariances",
    "NonFiniteActivationError",
    "utilization",
    # ranks
    "ExplainedVariance",
    "ParameterBudget",
    "FlopBudget",
    "ByteBudget",
    "LatencyBudget",
    "measure_latency",
    "Ranks",
    "search_ranks",
    "measured_ranks",
    # compression
    "CompressionConfig",
    "compress_",
    "SequentialReconstruction",
    "BlockReconstruction",
    "measure_errors",
    "LowRankLinear",
    "LowRankConv2d",
    "finetune_",
    # checkpoints
    "save_pretrained",
    "load_pretrained",
    "CheckpointError",
]
from . import integrations as integrations
from .version import __version__ as __version__
