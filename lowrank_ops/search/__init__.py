"""Ranks by trial compressions.

In: a model, Covariances, and a function that evaluates a model, or batches. Out: Ranks.
"""

from .measured import measured_ranks as measured_ranks
from .search import search_ranks as search_ranks
