"""The process that we run in: which optional packages it has, and the signals that it gets."""
