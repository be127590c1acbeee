"""Low-rank factors of one layer.

In: LayerSubspaces, a rank and a projection. Out: Factors(down, up, bias).
"""
