"""Streams activations and output gradients of a model's layers.

In: a model and batches. Out: Covariances, {fqn: LayerStatistics}.
"""

from .calibrator import Calibrator as Calibrator
from .calibrator import calibrate as calibrate
from .covariances import Covariances as Covariances
from .plan import CalibrationPlan as CalibrationPlan
from .plan import plan_calibration as plan_calibration
from .statistics import LayerStatistics as LayerStatistics
from .statistics import Moments as Moments
from .statistics import NonFiniteActivationError as NonFiniteActivationError
