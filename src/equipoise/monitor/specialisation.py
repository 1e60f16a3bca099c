"""What each expert serves, as records: counts by domain, token class and position, tokens, saturation; and their file.

`specialisation_counts.py` makes them, `equipoise specialise` writes them into a run folder, pictures and the dashboard
read them. Plain numbers: no model, no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.monitor.store_records import nulls

FILE_NAME = "specialisation.json"
FORMAT = "equipoise specialisation 1"
MAX_BYTES = 64 * 2**20  # of a file that is read
MIN_EXPECTED = 5.0  # tokens: with fewer, chance alone doubles and halves
SIGNIFICANT = 0.05  # over all layers together
DOMAIN, TOKEN_CLASS, POSITION = SPLITS = ("domain", "token class", "position")


@dataclass(frozen=True)
class Information:
    """How much the expert tells about a token's group, in nats.

    nats: mutual information of group and expert over assignments. floor: its average without any relation, were tokens
    independent. control, control_95: mean and 95th percentile of the same number with labels as chance has them.
    p_value: share of the controls, the text as it is counted among them, that reach nats. maximum: the smaller of the
    groups' entropy and ln(E/K).
    """

    nats: float
    floor: float
    control: float
    control_95: float
    p_value: float
    maximum: float

    @property
    def beyond_chance(self) -> float:
        """nats - control."""
        return self.nats - self.control


@dataclass(frozen=True)
class Split:
    """Experts against groups of tokens. tokens: by group. counts: assignments, a row of experts per group."""

    groups: tuple[str, ...]
    tokens: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    information: Information

    @property
    def counts_GE(self) -> np.ndarray:
        """int64 (G, E)."""
        return np.array(self.counts, dtype=np.int64).reshape(len(self.groups), -1)

    @property
    def shares_GE(self) -> np.ndarray:
        """float64 (G, E): of a group's tokens the share that reaches each expert, N_ge / N_g; rows sum to K.

        Of domains this is OLMoE's domain specialisation. 0 for a group without tokens.
        """
        shares: np.ndarray = self.counts_GE / np.maximum(np.array(self.tokens), 1)[:, None]
        return shares

    @property
    def lift_GE(self) -> np.ndarray:
        """float64 (G, E): shares_GE relative to the expert's share of all tokens; 1 is chance, E/K the most.

        NaN where chance has fewer than 5 tokens: too few to tell.
        """
        load_E = self.counts_GE.sum(0) / max(sum(self.tokens), 1)
        expected_GE = np.array(self.tokens)[:, None] * load_E[None, :]
        few_GE = expected_GE < MIN_EXPECTED
        lift_GE: np.ndarray = np.where(few_GE, np.nan, self.counts_GE / np.where(few_GE, 1.0, expected_GE))
        return lift_GE


@dataclass(frozen=True)
class Vocabulary:
    """How far entries of the vocabulary keep to an expert. entries: that occur at least 8 times; the rest is left out.

    top_share: the share of an entry's occurrences that reach its first expert, max_e N_xe / N_x, mean over occurrences.
    control_top_share: the same with the tokens of each window turned round.
    """

    entries: int
    top_share: float
    control_top_share: float
    information: Information


@dataclass(frozen=True)
class Served:
    """An entry of the vocabulary that an expert serves: `served` of `occurs` occurrences, `lift` times chance."""

    id: int
    text: str
    served: int
    occurs: int
    lift: float


@dataclass(frozen=True)
class LayerRoles:
    """One layer. load: tokens that reach each expert. splits: by DOMAIN (where known), TOKEN_CLASS, POSITION.

    tokens: for each expert the entries that it serves beyond chance, the clearest first.
    """

    layer: str
    num_tokens: int
    load: tuple[int, ...]
    splits: Mapping[str, Split]
    vocabulary: Vocabulary
    tokens: tuple[tuple[Served, ...], ...]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.load)

    def best_group(self, split: str, expert: int) -> tuple[str, float] | None:
        """The group that the expert serves most beyond chance, and its lift; None where there are too few tokens."""
        found = self.splits.get(split)
        if found is None:
            return None
        lift_G = found.lift_GE[:, expert]
        if np.isnan(lift_G).all():
            return None
        group = int(np.nanargmax(lift_G))
        return found.groups[group], float(lift_G[group])


@dataclass(frozen=True)
class Saturation:
    """Of checkpoints: the share of the last one's choices that each already makes, on the same tokens.

    steps: rising; the last is the last checkpoint's, with overlap 1. overlap, chance: by layer, one number per step.
    """

    steps: tuple[int, ...]
    overlap: Mapping[str, tuple[float, ...]]
    chance: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Roles:
    """What `equipoise specialise` found in a run. text: where the tokens are from, in words. notes: what is missing."""

    step: int
    text: str
    num_tokens: int
    num_documents: int
    window: int
    layers: tuple[LayerRoles, ...]
    saturation: Saturation
    notes: tuple[str, ...] = field(default=())

    def found(self, split: str) -> tuple[str, ...]:
        """The layers in which the expert tells more about the group than chance does (Bonferroni over layers)."""
        limit = SIGNIFICANT / max(len(self.layers), 1)
        return tuple(
            layer.layer
            for layer in self.layers
            if split in layer.splits and layer.splits[split].information.p_value <= limit
        )

    def to_json(self) -> bytes:
        """As it is written; numbers that are not known are null."""
        return json.dumps(nulls({"format": FORMAT, **asdict(self)}), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Roles:
        """Read what `to_json` made. Raises ValueError for anything else."""
        try:
            record = json.loads(data)
            if record["format"] != FORMAT:
                raise ValueError(f"its format is {str(record['format'])[:60]!r}, expected {FORMAT!r}")
            roles = cls(
                step=int(record["step"]),
                text=str(record["text"]),
                num_tokens=int(record["num_tokens"]),
                num_documents=int(record["num_documents"]),
                window=int(record["window"]),
                layers=tuple(map(_layer, record["layers"])),
                saturation=_saturation(record["saturation"]),
                notes=tuple(map(str, record["notes"])),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no record of specialisation ({_told(error)})") from error
        return roles


def read_roles(folder: Path) -> Roles | None:
    """What was written into a run folder; None where nothing was. Raises ValueError for a damaged file."""
    path = folder / FILE_NAME
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        return Roles.from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {_told(error)}; make it anew with equipoise specialise") from error


# --------------------------------------------------------------------------------------------------------- reading


def _layer(record: Any) -> LayerRoles:
    load = tuple(map(int, record["load"]))
    vocabulary = record["vocabulary"]
    layer = LayerRoles(
        layer=str(record["layer"]),
        num_tokens=int(record["num_tokens"]),
        load=load,
        splits={str(name): _split(each, len(load)) for name, each in record["splits"].items()},
        vocabulary=Vocabulary(
            int(vocabulary["entries"]),
            _number(vocabulary["top_share"]),
            _number(vocabulary["control_top_share"]),
            _information(vocabulary["information"]),
        ),
        tokens=tuple(tuple(map(_served, each)) for each in record["tokens"]),
    )
    if len(layer.tokens) != len(load):
        raise ValueError(f"{layer.layer}: tokens of {len(layer.tokens)} experts, expected {len(load)}")
    return layer


def _split(record: Any, num_experts: int) -> Split:
    counts = tuple(tuple(map(int, row)) for row in record["counts"])
    groups, tokens = tuple(map(str, record["groups"])), tuple(map(int, record["tokens"]))
    if not len(groups) == len(tokens) == len(counts) or {len(row) for row in counts} - {num_experts}:
        raise ValueError(f"counts: expected {len(groups)} rows of {num_experts} experts")
    return Split(groups, tokens, counts, _information(record["information"]))


def _information(record: Any) -> Information:
    return Information(
        *(_number(record[name]) for name in ("nats", "floor", "control", "control_95", "p_value", "maximum"))
    )


def _served(record: Any) -> Served:
    return Served(
        int(record["id"]), str(record["text"]), int(record["served"]), int(record["occurs"]), _number(record["lift"])
    )


def _saturation(record: Any) -> Saturation:
    steps = tuple(map(int, record["steps"]))
    curves = [
        {str(name): tuple(map(_number, values)) for name, values in record[key].items()}
        for key in ("overlap", "chance")
    ]
    if any(len(values) != len(steps) for each in curves for values in each.values()):
        raise ValueError(f"saturation: expected {len(steps)} numbers for each layer")
    return Saturation(steps, *curves)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _told(error: Exception) -> str:
    return f"{error!r}" if isinstance(error, KeyError) else str(error)
