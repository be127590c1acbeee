"""A user's model: its layers as matrices, how it is called, which rows are padding.

In: an nn.Module and its batches. Out: {fqn: layer}, weight matrices, model outputs, masks.
"""
