"""Rank policies: how many directions each layer keeps.

In: LayerSubspaces and a policy. Out: {fqn: rank}, None for a layer that stays dense.
"""

from .choose import choose_ranks as choose_ranks
