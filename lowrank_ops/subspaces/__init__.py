"""Principal directions of a layer's input and output, explained variance and utilization.

In: LayerStatistics and a weight. Out: LayerSubspaces.
"""

from .layer import LayerSubspaces as LayerSubspaces
from .layer import layer_subspaces as layer_subspaces
from .principal import Subspace as Subspace
