"""Planning: arithmetic about where experts live, without torch."""

from equipoise.plan.cluster import Cluster
from equipoise.plan.eplb import eplb, eplb_placement
from equipoise.plan.placement import Aim, plan_layers
from equipoise.plan.placement_file import read_placements, write_placements
from equipoise.plan.replicas import ranks_of_choices
from equipoise.plan.score import Score, num_moved, score_layers
from equipoise.plan.traffic import Traffic, traffic_of_ids

__all__ = [
    "Aim",
    "Cluster",
    "Score",
    "Traffic",
    "eplb",
    "eplb_placement",
    "num_moved",
    "plan_layers",
    "ranks_of_choices",
    "read_placements",
    "score_layers",
    "traffic_of_ids",
    "write_placements",
]
