"""How much of a real model's accuracy is left at a given size: ``python -m benchmarks.accuracy.X`` in a checkout.

``vision``: the demo's Vision Transformer, before and after fine-tuning.
``text``: a sentence encoder on two kinds of text, which ``corpora`` collects and ``encoder`` embeds.
``decomposition``: ways to decompose wide covariances. ``results`` keeps the rows.
"""
