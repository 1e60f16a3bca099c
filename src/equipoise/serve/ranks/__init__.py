"""Serving over expert-parallel ranks: one rank has everything but most experts, the others hold those."""
