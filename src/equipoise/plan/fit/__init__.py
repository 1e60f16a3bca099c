"""Does a model fit: parameters, memory per rank, communication, and what to change if it doesn't. Arithmetic alone."""

from equipoise.plan.fit.architecture import Architecture
from equipoise.plan.fit.communication import Machine
from equipoise.plan.fit.known import KNOWN
from equipoise.plan.fit.memory import Memory, memory
from equipoise.plan.fit.model_file import find_model
from equipoise.plan.fit.parameters import Parameters, parameters
from equipoise.plan.fit.plan import Plan, make_plan
from equipoise.plan.fit.setup import Mesh, Serving, Setup, Training

__all__ = [
    "KNOWN",
    "Architecture",
    "Machine",
    "Memory",
    "Mesh",
    "Parameters",
    "Plan",
    "Serving",
    "Setup",
    "Training",
    "find_model",
    "make_plan",
    "memory",
    "parameters",
]
