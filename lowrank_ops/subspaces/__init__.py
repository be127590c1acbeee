"""Principal directions of a layer's input and output, explained variance and utilization.

In: LayerStatistics and a weight. Out: LayerSubspaces.
"""
