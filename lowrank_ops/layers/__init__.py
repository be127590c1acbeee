"""Low-rank, narrower and 8-bit layers, how they replace a model's dense layers, and how long both take.

In: dense layers and their Factors. Out: such layers in the model, or LayerLatencies.
"""

from ._base import LowRankLayer as LowRankLayer
from .attention import convert_attention_ as convert_attention_
from .conv import LowRankConv1d as LowRankConv1d
from .conv import LowRankConv2d as LowRankConv2d
from .eight_bit import EightBitLinear as EightBitLinear
from .eight_bit import quantize_ as quantize_
from .group import group_ as group_
from .latency import measure_latency as measure_latency
from .linear import LowRankLinear as LowRankLinear
from .narrow import NarrowLinear as NarrowLinear
from .pivoted import PivotedLinear as PivotedLinear
from .plain import to_dense_layers as to_dense_layers
from .plain import to_plain_layers as to_plain_layers
from .replace import replace_ as replace_
