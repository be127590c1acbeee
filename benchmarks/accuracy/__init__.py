"""How much of a real model's accuracy is left at a given size: ``python -m benchmarks.accuracy.X`` in a checkout.

``vision``: the demo's Vision Transformer, before and after fine-tuning.
``calibration_size``: the same, by how many images it was calibrated with.
``pretraining``: the same, trained by labels and as a masked autoencoder.
``text``: a sentence encoder on two kinds of text, which ``corpora`` collects and ``encoder`` embeds.
``decomposition``: ways to decompose wide covariances. ``results`` keeps the rows.
"""
