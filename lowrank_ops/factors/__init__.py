"""Low-rank factors of one layer, or the narrower layers of an MLP.

In: LayerSubspaces, a rank and a projection. Out: Factors(down, up, bias).
"""

from .projections import Factors as Factors
from .projections import factorize as factorize
