"""What chance explains, for all layers and experts of a model together: bounds in nats, as -ln of a probability.

61 layers of 256 experts are 15,616 opinions per window; what is rare for one of them is common among all. A rule's
opinions share one rate of false alarms, each takes its part (Bonferroni), so it does not matter how they depend on each
other. What is assumed is that tokens are independent: text that comes in clumps moves more than this.
"""

from __future__ import annotations

import math

import numpy as np

FALSE_ALARMS = 1e-6  # per rule and window, for the whole model


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError unless it is a probability that a rule can keep."""
    if not 0.0 < rate < 1.0:
        raise ValueError(f"{name}: expected a probability per window between 0 and 1, got {rate!r}")


def needed_nats(num_opinions: int, rate: float) -> float:
    """What each of so many opinions must reach so that all of them together are wrong with at most that probability."""
    return math.log(max(num_opinions, 1) / rate)


def share_nats(share: float, fair: float, num: float) -> float:
    """A bound on how rarely chance brings a share of `num` so far above `fair`: num KL(share, fair); 0 if not above.

    P(share or more) <= exp(-nats) for the sum of `num` independent events, also of different probabilities with the
    mean `fair` (W. Hoeffding, "Probability inequalities for sums of bounded random variables", 1963, theorem 1). As a
    token chooses an expert at most once, tokens are such events.
    """
    if share <= fair:
        return 0.0
    if fair <= 0.0:
        return math.inf
    rest = 0.0 if share >= 1.0 else (1.0 - share) * math.log((1.0 - share) / (1.0 - fair))
    return num * (share * math.log(share / fair) + rest)


def highest_share(fair: float, num: float, nats: float) -> float:
    """The share of `num` above which `share_nats` is at least that much; infinite where even all of them is less."""
    if share_nats(1.0, fair, num) < nats:
        return math.inf
    low, high = fair, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if share_nats(middle, fair, num) < nats else (low, middle)
    return high


def uneven_nats(counts_E: np.ndarray) -> float:
    """A bound on how rarely a fair router's load is so uneven as a whole; 0 where chance explains it.

    With n assignments to E experts and d = KL(load, fair): P <= exp(-n d) (e n d / (E - 1))^(E - 1) for n d > E - 1
    (R. Agrawal, "Finite-sample concentration of the multinomial in relative entropy", 2020). K distinct experts per
    token vary less than K independent ones.
    """
    total, others = float(counts_E.sum()), len(counts_E) - 1
    share_E = counts_E[counts_E > 0] / max(total, 1.0)
    nats = total * float((share_E * np.log(share_E * len(counts_E))).sum())
    return max(0.0, nats - others * math.log(math.e * nats / others)) if nats > others > 0 else 0.0
