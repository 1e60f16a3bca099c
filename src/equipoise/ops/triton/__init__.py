"""Triton kernels for the lean path on GPUs. `experts.py` is the way in; nothing here imports triton before it runs."""
