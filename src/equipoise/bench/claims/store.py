"""What came of claims, kept in the folder of the runs, so that a report can show those that were not measured anew."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from equipoise.bench.claims.claim import Claim, Found, Reading
from equipoise.bench.claims.statistics import Range
from equipoise.disk.atomic import atomic_write


def source_version(root: Path | None = None) -> str:
    """A hash of the package's whole source: what was measured with another one is measured again."""
    root = root or Path(__file__).parents[2]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def keep(found: Found, out: Path, source: str) -> None:
    """Write it to OUT/claims."""
    groups = {name: [asdict(r) for r in getattr(found, name)] for name in ("readings", "control", "present")}
    record = {"source": source, "verdict": found.verdict, "note": found.note} | groups
    with atomic_write(_path(found.claim, out)) as file:
        file.write(json.dumps(record, indent=1).encode())


def kept(claim: Claim, out: Path, source: str) -> Found | None:
    """What `keep` wrote for the same source; None where there is nothing that can be read."""
    try:
        record = json.loads(_path(claim, out).read_text(encoding="utf-8"))
        if record["source"] != source:
            return None
        readings, control, present = (
            tuple(_reading(each) for each in record[name]) for name in ("readings", "control", "present")
        )
        return Found(claim, record["verdict"], readings, control, present, record["note"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _path(claim: Claim, out: Path) -> Path:
    return out / "claims" / f"{claim.name}.json"


def _reading(record: dict[str, Any]) -> Reading:
    return Reading(**record | {"values": tuple(record["values"]), "claimed": Range(**record["claimed"])})


def fields_of(found: Found) -> dict[str, Any]:
    """For JSON: an interval without ends is null."""
    claim = found.claim
    names = ("name", "theme", "hypothesis", "where", "theirs", "method", "control_is")
    plain = {name: getattr(claim, name) for name in names}
    groups = {
        name: [_fields_of(reading) for reading in getattr(found, name)] for name in ("readings", "control", "present")
    }
    return plain | {"verdict": found.verdict, "note": found.note} | groups


def _fields_of(reading: Reading) -> dict[str, Any]:
    interval = reading.interval
    ends = [interval.low, interval.high] if math.isfinite(interval.low) else None
    plain = {"name": reading.name, "unit": reading.unit, "claimed": str(reading.claimed), "values": reading.values}
    return plain | {"mean": interval.mean, "interval_95": ends, "outcome": reading.outcome}
