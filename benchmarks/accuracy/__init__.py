"""Accuracy at equal size, on real models."""
