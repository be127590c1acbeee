"""A trained Vision Transformer, compressed and compared with the dense one: ``lowrank-ops demo``.

In: the images and weights in the folder ``demo`` of a checkout. Out: report.json and report.png.
"""
