"""Planning: arithmetic about where experts live, without torch."""

from equipoise.plan.placement_file import read_placements, write_placements

__all__ = ["read_placements", "write_placements"]
