"""Rank search by trial compressions.

In: a model, Covariances and a function that evaluates a model. Out: Ranks.
"""

from .search import search_ranks as search_ranks
