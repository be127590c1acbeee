"""Low-rank factors of one layer.

In: LayerSubspaces, a rank and a projection. Out: Factors(down, up, bias).
"""

from .projections import Factors as Factors
from .projections import factorize as factorize
