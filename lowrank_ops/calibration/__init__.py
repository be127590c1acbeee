"""Streams activations and output gradients of a model's layers.

In: a model and batches. Out: Covariances, {fqn: LayerStatistics}.
"""
