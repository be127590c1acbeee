"""Sequential reconstruction: factors refitted, layer by layer, to the dense model's outputs.

In: a model, Factors and batches. Out: Factors.
"""
