"""Architectures side by side: same data, same tokens, same active arithmetic, seeds paired."""
