"""Accuracy of real models at equal size: ``python -m benchmarks.accuracy.X`` in a checkout.

``vision``: the demo's Vision Transformer, before and after fine-tuning.
``calibration_size``: the same, by the number of calibration images.
``pretraining``: the same, trained on labels and as a masked autoencoder.
``text``: a sentence encoder on two kinds of text, which ``corpora`` collects and ``encoder`` embeds.
``language``: a language model, on text of the calibration's kind and of another.
``speech``: the encoder of a speech recognizer, which ``whisper`` reads from PyPI, on speech from ``audio``.
``convolution``: a pitch estimator on speech and tones, from ``audio``.
``budgets``: whether parameter, MAC and latency budgets are met.
``predicted``: predicted and measured output errors.
``results`` stores the rows.
"""
