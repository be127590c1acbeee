"""Low-rank layers and their place in a model.

In: Factors. Out: LowRankLinear and LowRankConv2d, put into the model all or none.
"""
