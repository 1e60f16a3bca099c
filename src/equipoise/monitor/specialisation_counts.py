"""Who serves what, counted: experts against groups of tokens and against vocabulary entries, each beside its chance.

Pure functions of NumPy arrays. Assignments are int (2, N): the number in [0, T) of each assignment's token, and its
expert, so that routers with any number of experts per token fit. Definitions: OLMoE (arXiv 2409.02060, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from equipoise.monitor.specialisation import Information, Served, Split, Vocabulary

MIN_OCCURRENCES = 8  # of a vocabulary entry: rarer ones have shares of 0 and 1 whatever the router does
SIGNIFICANT = 0.01  # over all entries and experts of a layer together
CLASSES = (
    "word start", "word continuation", "capitalised", "digit", "punctuation", "code symbol", "white space", "newline",
    "non-ASCII", "control",
)  # fmt: skip
_PUNCTUATION = frozenset(".,;:!?'\"-()")

# ------------------------------------------------------------------------------------------------- groups of tokens


def token_class(piece: bytes) -> str:
    """One of CLASSES, by what a token stands for: by its first character that is no white space.

    piece: the bytes of the token, empty for one that stands for no text, which is "control". Anything that is not
    ASCII is "non-ASCII", parts of letters too. A small letter begins a word where white space is before it in the
    token itself: what was before the token is not known here.
    """
    if not piece:
        return "control"
    if any(byte >= 0x80 for byte in piece):
        return "non-ASCII"
    text = piece.decode("ascii")
    bare = text.strip()
    if not bare:
        return "newline" if "\n" in text else "white space"
    first = bare[0]
    if first.isdigit():
        return "digit"
    if first.isupper():
        return "capitalised"
    if first.islower():
        return "word start" if text[0].isspace() else "word continuation"
    if first in _PUNCTUATION:
        return "punctuation"
    return "code symbol" if first.isprintable() else "control"


def position_bucket(positions: np.ndarray) -> np.ndarray:
    """int64 of the same shape: 0 for position 0, then one more for each doubling: 1, 2-3, 4-7, 8-15, ..."""
    return np.ceil(np.log2(np.asarray(positions, dtype=np.float64) + 1)).astype(np.int64)


def position_names(length: int) -> tuple[str, ...]:
    """The names of the buckets of positions 0 to length - 1."""
    names = ["0", "1"]
    while (first := 2 ** (len(names) - 1)) < length:
        names.append(f"{first}-{min(2 * first, length) - 1}" if min(2 * first, length) - 1 > first else str(first))
    return tuple(names[: 1 + int(position_bucket(np.array(length - 1)))])


# ---------------------------------------------------------------------------------------------------------- counts


def counts_of(groups_T: np.ndarray, assignments: np.ndarray, num_groups: int, num_experts: int) -> np.ndarray:
    """int64 (G, E): assignments by group of their token and expert. Raises ValueError for what is out of range."""
    token_ids_N, expert_ids_N = assignments
    _check("groups_T", groups_T, num_groups)
    _check("experts of assignments", expert_ids_N, num_experts)
    _check("tokens of assignments", token_ids_N, len(groups_T))
    cells_N = groups_T[token_ids_N].astype(np.int64) * num_experts + expert_ids_N
    return np.bincount(cells_N, minlength=num_groups * num_experts).reshape(num_groups, num_experts)


def mutual_information(counts_GE: np.ndarray) -> float:
    """I(G; E) in nats of a table of counts: sum p(g, e) ln(p(g, e) / (p(g) p(e))). 0 when nothing was counted."""
    total = counts_GE.sum()
    if total == 0:
        return 0.0
    joint = counts_GE / total
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return max(0.0, float((joint[seen] * np.log(joint[seen] / independent[seen])).sum()))


def finite_sample_floor(counts_GE: np.ndarray) -> float:
    """What mutual_information is on average without any relation, nats: (G - 1)(E - 1) / 2N (Miller 1955).

    Of groups and experts that occur, for N independent assignments. Tokens of one text are not independent: the
    control is what counts, and it is the higher of the two.
    """
    total = int(counts_GE.sum())
    num_groups, num_experts = int((counts_GE.sum(1) > 0).sum()), int((counts_GE.sum(0) > 0).sum())
    return max(0, num_groups - 1) * max(0, num_experts - 1) / (2 * total) if total else 0.0


def information(
    groups_T: np.ndarray, assignments: np.ndarray, num_groups: int, num_experts: int, controls: Sequence[np.ndarray]
) -> Information:
    """How much the expert tells about the group of a token, beside the same with other labels.

    controls: labels (T,) as chance would have them, one array each; see `documents_swapped` and `windows_turned`.
    """
    counts_GE = counts_of(groups_T, assignments, num_groups, num_experts)
    measured = mutual_information(counts_GE)
    others = np.array(
        [mutual_information(counts_of(each, assignments, num_groups, num_experts)) for each in controls] or [math.nan]
    )
    share_G = counts_GE.sum(1) / max(int(counts_GE.sum()), 1)
    entropy = -float((share_G[share_G > 0] * np.log(share_G[share_G > 0])).sum())
    per_token = max(counts_GE.sum() / max(len(groups_T), 1), 1.0)
    return Information(
        nats=measured,
        floor=finite_sample_floor(counts_GE),
        control=float(others.mean()),
        control_95=float(np.quantile(others, 0.95)),
        p_value=float((1 + (others >= measured).sum()) / (1 + len(controls))),
        maximum=min(entropy, float(np.log(num_experts / per_token))),
    )


def split(
    names: Sequence[str],
    groups_T: np.ndarray,
    assignments: np.ndarray,
    num_experts: int,
    controls: Sequence[np.ndarray],
) -> Split:
    """Experts against groups: counts of both, and how much the expert tells."""
    counts_GE = counts_of(groups_T, assignments, len(names), num_experts)
    return Split(
        groups=tuple(names),
        tokens=tuple(np.bincount(groups_T, minlength=len(names)).tolist()),
        counts=tuple(map(tuple, counts_GE.tolist())),
        information=information(groups_T, assignments, len(names), num_experts, controls),
    )


# -------------------------------------------------------------------------------------------------------- controls


def documents_swapped(groups_M: np.ndarray, documents_T: np.ndarray, num: int, seed: int) -> list[np.ndarray]:
    """Labels of tokens when whole documents swap theirs: for what all tokens of a document share, as its domain.

    groups_M: by document. documents_T: the document of each token. Tokens keep what else ties them together inside a
    document, so a router that goes by the document alone is no specialist.
    """
    rng = np.random.default_rng(seed)
    return [rng.permutation(groups_M)[documents_T] for _ in range(num)]


def windows_turned(groups_T: np.ndarray, length: int, num: int, seed: int) -> list[np.ndarray]:
    """Labels of tokens when each window's are turned round by an offset of its own: for what changes inside a text.

    length: of a window; T is a multiple of it. Labels keep their numbers and their neighbours in each window, and lose
    only which token they belong to.
    """
    if length < 1 or len(groups_T) % length:
        raise ValueError(f"length: expected a divisor of {len(groups_T)}, the number of tokens, got {length}")
    rng = np.random.default_rng(seed)
    rows_WS = groups_T.reshape(-1, length)
    return [
        np.take_along_axis(
            rows_WS, (np.arange(length) + rng.integers(0, length, (len(rows_WS), 1))) % length, axis=1
        ).reshape(-1)
        for _ in range(num)
    ]


# ------------------------------------------------------------------------------------------------------ vocabulary


def frequent_entries(token_ids_T: np.ndarray, at_least: int = MIN_OCCURRENCES) -> tuple[np.ndarray, np.ndarray]:
    """(U,) ids of vocabulary entries that occur so often, rising; (T,) the number of each token's, -1 for the rest."""
    ids, index_T, counts = np.unique(token_ids_T, return_inverse=True, return_counts=True)
    kept = counts >= at_least
    numbers = np.where(kept, np.cumsum(kept) - 1, -1)
    return ids[kept], numbers[index_T.reshape(-1)]


def vocabulary(
    token_ids_T: np.ndarray, assignments: np.ndarray, num_experts: int, controls: Sequence[np.ndarray]
) -> Vocabulary:
    """How far single entries of the vocabulary keep to an expert, on average over their occurrences.

    controls: token ids (T,) as chance would have them (`windows_turned` of token_ids_T).
    """
    ids, _ = frequent_entries(token_ids_T)
    all_ids = [token_ids_T, *controls]
    tables = [_entries_against_experts(each, ids, assignments, num_experts) for each in all_ids]
    shares = [_top_share(*each) for each in tables]
    nats = np.array([mutual_information(counts_UE) for counts_UE, _ in tables])
    counts_UE, occurs_U = tables[0]
    share_U = occurs_U / max(int(occurs_U.sum()), 1)
    entropy = -float((share_U[share_U > 0] * np.log(share_U[share_U > 0])).sum())
    per_token = max(float(counts_UE.sum()) / max(int(occurs_U.sum()), 1), 1.0)
    others = nats[1:] if controls else np.array([math.nan])
    return Vocabulary(
        entries=len(ids),
        top_share=shares[0],
        control_top_share=float(np.mean(shares[1:])) if controls else math.nan,
        information=Information(
            nats=float(nats[0]),
            floor=finite_sample_floor(counts_UE),
            control=float(others.mean()),
            control_95=float(np.quantile(others, 0.95)),
            p_value=float((1 + (others >= nats[0]).sum()) / (1 + len(controls))),
            maximum=min(entropy, float(np.log(num_experts / per_token))),
        ),
    )


def most_served(
    token_ids_T: np.ndarray, assignments: np.ndarray, num_experts: int, text_of: Callable[[int], str], limit: int
) -> tuple[tuple[Served, ...], ...]:
    """For each expert the entries that it serves more often than chance explains, at most so many, the most first.

    Chance: each occurrence reaches the expert with the expert's share of all tokens, N_e / T. Taken are entries whose
    log-likelihood ratio (Dunning 1993) passes SIGNIFICANT over all entries and experts together; their order is by that
    ratio, which weighs both how much more often and how often. lift = (N_xe / N_x) / (N_e / T).
    """
    ids, _ = frequent_entries(token_ids_T)
    counts_UE, occurs_U = _entries_against_experts(token_ids_T, ids, assignments, num_experts)
    load_E = np.bincount(assignments[1], minlength=num_experts) / max(len(token_ids_T), 1)
    ratio_UE, limit_ratio = likelihood_ratio(counts_UE, occurs_U, load_E), significant_ratio(counts_UE.size)
    found = []
    for expert in range(num_experts):
        order = np.argsort(-ratio_UE[:, expert], kind="stable")[:limit]
        found.append(
            tuple(
                Served(
                    id=int(ids[u]),
                    text=text_of(int(ids[u])),
                    served=int(counts_UE[u, expert]),
                    occurs=int(occurs_U[u]),
                    lift=float(counts_UE[u, expert] / occurs_U[u] / load_E[expert]),
                )
                for u in order
                if ratio_UE[u, expert] > limit_ratio
            )
        )
    return tuple(found)


def likelihood_ratio(counts_UE: np.ndarray, occurs_U: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """float64 (U, E): 2 ln of how much better N_xe / N_x explains the counts than N_e / T, below 0 where it is less."""
    n, m = counts_UE.astype(np.float64), occurs_U[:, None].astype(np.float64)
    chance = np.clip(load_E[None, :], 1e-300, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        served = np.where(n > 0, n * np.log(n / (m * chance)), 0.0)
        missed = np.where(m > n, (m - n) * np.log((m - n) / (m * np.maximum(1 - chance, 1e-300))), 0.0)
    ratio: np.ndarray = 2 * (served + missed) * np.where(n > m * chance, 1.0, -1.0)
    return ratio


def significant_ratio(num_tests: int) -> float:
    """What a likelihood ratio must pass: chi-squared of one degree, one-sided, SIGNIFICANT over so many tests."""
    return NormalDist().inv_cdf(1 - SIGNIFICANT / max(num_tests, 1)) ** 2


def _entries_against_experts(
    token_ids_T: np.ndarray, ids: np.ndarray, assignments: np.ndarray, num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """int64 (U, E) and (U,): assignments of the entries, and how often they occur."""
    if not len(ids):
        return np.zeros((0, num_experts), dtype=np.int64), np.zeros(0, dtype=np.int64)
    place_T = np.searchsorted(ids, token_ids_T).clip(0, len(ids) - 1)
    number_T = np.where(ids[place_T] == token_ids_T, place_T, len(ids))  # the rest are one entry more, left out
    counts_UE = counts_of(number_T, assignments, len(ids) + 1, num_experts)[:-1]
    return counts_UE, np.bincount(number_T, minlength=len(ids) + 1)[:-1]


def _top_share(counts_UE: np.ndarray, occurs_U: np.ndarray) -> float:
    """Of an occurrence, the share of its entry's occurrences that reach the entry's first expert; 0 without entries."""
    return float(counts_UE.max(axis=1).sum() / occurs_U.sum()) if len(occurs_U) and occurs_U.sum() else 0.0


# ------------------------------------------------------------------------------------------------------ saturation


def overlap(early: np.ndarray, late: np.ndarray, num_experts: int) -> float:
    """Router saturation: share of the late assignments that are among the early ones, in [0, 1]; 1 without any.

    early, late: int (2, N), assignments of the same tokens. With K experts for each token it is (1/T) sum |A & B| / K.
    """
    keys = [each[0].astype(np.int64) * num_experts + each[1] for each in (early, late)]
    return float(np.isin(keys[1], keys[0]).mean()) if len(keys[1]) else 1.0


def overlap_by_chance(early: np.ndarray, late: np.ndarray, num_tokens: int, num_experts: int) -> float:
    """What `overlap` is when tokens are strangers and experts keep their loads; K/E when these are even."""
    loads = [np.bincount(each[1], minlength=num_experts) / max(num_tokens, 1) for each in (early, late)]
    return float((loads[0] * loads[1]).sum() / loads[1].sum()) if loads[1].sum() else 1.0


def _check(name: str, values: np.ndarray, end: int) -> None:
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= end):
        raise ValueError(
            f"{name}: expected values in [0, {end}), got {int(values.min())} to {int(values.max())}; count what is "
            "there, or leave it out"
        )
