"""How much of a real model's accuracy is left at a given size: ``python -m benchmarks.accuracy.X`` in a checkout.

``text``: a sentence encoder on two kinds of text, which ``corpora`` collects and ``encoder`` embeds.
"""
