"""Decoder language models around the MoE layer: configuration, attention, key/value caches, generation."""
