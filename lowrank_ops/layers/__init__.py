"""Low-rank layers, how they replace a model's dense layers, and how long both take.

In: dense layers and their Factors. Out: LowRankLinear and LowRankConv2d in the model, or LayerLatencies.
"""

from .conv2d import LowRankConv2d as LowRankConv2d
from .latency import measure_latency as measure_latency
from .linear import LowRankLinear as LowRankLinear
from .plain import to_dense_layers as to_dense_layers
from .plain import to_plain_layers as to_plain_layers
from .replace import replace_ as replace_
