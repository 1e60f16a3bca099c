"""Measurements that are kept honest: variants side by side, compared before they are timed."""
