"""Break a model, its monitor or its files on purpose, so that monitors and repairs can be tried.

In tests, in demonstrations, by users: `inject` puts a fault into a live model and returns what takes it out again. The
table of all faults is FAULTS in catalogue.py. A run in another process gets its faults through requests.py and desk.py.
"""

from equipoise.faults.catalogue import FAULTS, Fault, from_json, to_json
from equipoise.faults.counters import StaleCounters, inject_counters
from equipoise.faults.data import SkewedInput, skewed_rows
from equipoise.faults.desk import FaultDesk
from equipoise.faults.experts import NaNExpert
from equipoise.faults.files import CheckpointDamage, checkpoint_of, damage
from equipoise.faults.injection import Change, Injection, ModelFault, inject
from equipoise.faults.router import (
    BiasRunaway,
    Collapse,
    DeadExpert,
    Drift,
    LogitBlowUp,
    RouterCorruption,
    constant_direction,
)
from equipoise.faults.slow import SlowExpert, SlowRank

__all__ = [
    "FAULTS",
    "BiasRunaway",
    "Change",
    "CheckpointDamage",
    "Collapse",
    "DeadExpert",
    "Drift",
    "Fault",
    "FaultDesk",
    "Injection",
    "LogitBlowUp",
    "ModelFault",
    "NaNExpert",
    "RouterCorruption",
    "SkewedInput",
    "SlowExpert",
    "SlowRank",
    "StaleCounters",
    "checkpoint_of",
    "constant_direction",
    "damage",
    "from_json",
    "inject",
    "inject_counters",
    "skewed_rows",
    "to_json",
]
