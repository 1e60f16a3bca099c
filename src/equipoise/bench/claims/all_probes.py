"""All probes by name, and what code a probe depends on that not every run does.

The numbers of a run are found again by a hash of the code that they come from. A probe in a file of its own is part of
the hash of those runs alone that are probed by it: to write another one costs nobody's runs.
"""

from __future__ import annotations

from equipoise.bench.claims import healing_probe, leak_probe, limits_probe, probes
from equipoise.bench.claims.probes import Probe

_OWN: dict[str, tuple[Probe, tuple[str, ...]]] = {
    "healing": (healing_probe.healing, ("bench/claims/healing_probe.py", "faults/router.py")),
    "limits": (limits_probe.limits, ("bench/claims/limits_probe.py",)),
    "leak": (leak_probe.leak, ("bench/claims/leak_probe.py",)),
}
PROBES: dict[str, Probe] = probes.PROBES | {name: probe for name, (probe, _) in _OWN.items()}


def sources_of(probe: str) -> tuple[str, ...]:
    """Files of the package that the probe alone depends on; none for those that are part of every run's hash."""
    return _OWN[probe][1] if probe in _OWN else ()
