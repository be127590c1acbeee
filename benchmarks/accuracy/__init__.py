"""How much of a model's accuracy is left at a given size, run from a checkout as ``python -m benchmarks.accuracy.X``.

``vision``: the demo's Vision Transformer at equal size, before and after fine-tuning; ``calibration_size``: by how many
images it was calibrated; ``pretraining``: how it was trained. ``results`` keeps their rows.
"""
