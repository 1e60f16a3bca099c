"""Measurements on the user's machine: variants side by side in one process, as ratios, with the machine beside them."""
