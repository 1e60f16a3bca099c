"""Arithmetic about what a model and its traffic need, before any of it runs. No GPU, and no torch at import."""
