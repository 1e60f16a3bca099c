"""Experts on several ranks, applied to a model from outside; what the links between ranks cost."""
