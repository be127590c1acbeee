"""Reconstruction: factors fitted or trained to the dense model's outputs, layer by layer or block by block.

In: a model, Factors and batches. Out: Factors.
"""

from .blocks import BlockReconstruction as BlockReconstruction
from .blocks import reconstruct_blocks as reconstruct_blocks
from .sequential import SequentialReconstruction as SequentialReconstruction
from .sequential import reconstruct_factors as reconstruct_factors

# By their name in CompressionConfig.reconstruction and on the command line.
RECONSTRUCTIONS = {"sequential": SequentialReconstruction, "blocks": BlockReconstruction}
