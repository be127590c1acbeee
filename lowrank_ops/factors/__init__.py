"""Low-rank factors of one layer.

In: LayerSubspaces, a rank and a projection. Out: Factors(down, up, bias).
"""

from .factorize import Factors as Factors
from .factorize import factorize as factorize
