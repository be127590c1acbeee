"""Sequential reconstruction: factors refitted, layer by layer, to the dense model's outputs.

In: a model, Factors and batches. Out: Factors.
"""

from .sequential import SequentialReconstruction as SequentialReconstruction
from .sequential import reconstruct_factors as reconstruct_factors
