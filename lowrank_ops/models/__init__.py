"""A user's model: its layers as matrices, how it is run, which rows are padding.

In: an nn.Module. Out: {fqn: layer}, matrices, masks.
"""
