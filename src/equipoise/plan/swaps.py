"""Local search: swap the contents of two slots while that lowers the cost. Knows items, packs and costs; no ranks.

The cost of an arrangement is a sum over packs, and each term depends on that pack's items alone:

    n_p^2 / q_p  +  weight / P * (28 drift_p + mean over windows w of (load_wp)^8)  +  price * items new to the pack

n_p = sum of the items' shares: the part of the tokens that hit the pack, each counted as often as it hits. q_p = sum
over ordered pairs of items, an item with itself included, of the part of the tokens that hit both: the mean square of
the hits. Then n^2 / q <= P(a token hits the pack) (Chung and Erdos 1952), with equality where tokens hit it equally
often or not at all; summed over packs it is a lower bound of the fan-out. load_wp: 1 is as much as a pack should have.
drift_p is the variance of the pack's load over time; for small v, E(x + sqrt(v) normal)^8 = x^8 + 28 x^6 v.

As terms are of packs, a swap changes two of them, and swaps between different pairs of packs add up. So each round
makes several at once: the best one, then the best of those that touch none of its packs, and so on.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np

LEAST_GAIN = 3e-4  # of a swap: what is below takes long and adds up to little
MAX_ROUNDS = 40  # of one descent; most end by themselves after 10 to 25
POWER = 8  # of the load: high, as only the fullest pack is waited for
DRIFT = np.float32(POWER * (POWER - 1) / 2)


@dataclass(frozen=True, eq=False)
class Packing:
    """What the items are like. Float32: it is a search, what it finds is scored anew.

    share_I: part of the tokens that hit each item. pairs_II: part of the tokens that hit both, share_I on the diagonal;
    None where nothing is known about that. load_WI: by window. drift_II: covariance of the items' loads over time.
    there_PI: where items were before; None where moves are free. price: of each item in a pack where it was not.
    """

    share_I: np.ndarray
    pairs_II: np.ndarray | None
    load_WI: np.ndarray
    drift_II: np.ndarray
    there_PI: np.ndarray | None = None
    price: float = 0.0


class Descent:
    """An arrangement on its way down. items_PS: int64, the items in each pack's slots; a pack holds an item once."""

    def __init__(self, packing: Packing, items_PS: np.ndarray) -> None:
        self.packing = packing
        self.items_PS = items_PS.copy()
        self._hits_SI, self._load_SI = (
            np.zeros((items_PS.size, len(packing.share_I)), dtype=np.float32) for _ in range(2)
        )
        self._refresh(np.arange(len(items_PS)))

    def copy(self) -> Descent:
        """To go on from here more than once."""
        twin = copy(self)
        twin.items_PS, twin._hits_SI, twin._load_SI = (
            each.copy() for each in (self.items_PS, self._hits_SI, self._load_SI)
        )
        return twin

    def run(self, weight: float) -> int:
        """Swap until no swap lowers the cost with this weight of the load, or rounds run out. Returns how many."""
        num_packs, room = self.items_PS.shape
        items_S = self.items_PS.reshape(-1)
        factor, made = np.float32(weight / num_packs), 0
        change_SI = self._hits_SI + factor * self._load_SI
        change_SS = change_SI[:, items_S]
        change_SS = change_SS + change_SS.T
        for _ in range(MAX_ROUNDS):
            pairs = _best_swaps(change_SS, room)
            if not pairs:
                break
            made += len(pairs)
            a, b = np.array(pairs).T
            items_S[a], items_S[b] = items_S[b], items_S[a]
            packs_p = np.concatenate([a, b]) // room
            self._refresh(packs_p)
            slots_s = _slots_of(packs_p, room)
            change_SI[slots_s] = self._hits_SI[slots_s] + factor * self._load_SI[slots_s]
            change_sS = change_SI[slots_s][:, items_S] + change_SI[:, items_S[slots_s]].T
            change_SS[slots_s], change_SS[:, slots_s] = change_sS, change_sS.T
        return made

    def _refresh(self, packs_p: np.ndarray) -> None:
        """What it would change to have another item in a slot, for the slots of these packs."""
        items_pS = self.items_PS[packs_p]
        num_items = len(self.packing.share_I)
        hits_pSI = _change_of_hits(self.packing, items_pS)
        hits_pSI += _change_of_moves(self.packing, items_pS, packs_p)
        held_pI = np.zeros((len(packs_p), num_items), dtype=bool)
        held_pI[np.arange(len(packs_p))[:, None], items_pS] = True
        hits_pSI[np.broadcast_to(held_pI[:, None, :], hits_pSI.shape)] = np.inf  # nothing twice in a pack
        slots_s = _slots_of(packs_p, items_pS.shape[1])
        self._hits_SI[slots_s] = hits_pSI.reshape(-1, num_items)
        self._load_SI[slots_s] = _change_of_load(self.packing, items_pS).reshape(-1, num_items)


def _slots_of(packs_p: np.ndarray, room: int) -> np.ndarray:
    slots: np.ndarray = (packs_p[:, None] * room + np.arange(room)).reshape(-1)
    return slots


def _best_swaps(change_SS: np.ndarray, room: int) -> list[tuple[int, int]]:
    """Slots to swap, the best first, each a gain, and none in a pack that an earlier one has changed."""
    partner_S = change_SS.argmin(axis=1)
    best_S = change_SS[np.arange(len(change_SS)), partner_S]
    pairs, taken = [], set[int]()
    for slot in np.argsort(best_S, kind="stable").tolist():
        if best_S[slot] > -LEAST_GAIN:
            break
        other = int(partner_S[slot])
        packs = {slot // room, other // room}
        if not packs & taken:
            taken |= packs
            pairs.append((slot, other))
    return pairs


def _change_of_hits(packing: Packing, items_pS: np.ndarray) -> np.ndarray:
    """float32 (p, S, I): of n^2 / q, by slot and the item that takes its place."""
    share_I, pairs_II = packing.share_I, packing.pairs_II
    if pairs_II is None:
        return np.zeros((*items_pS.shape, len(share_I)), dtype=np.float32)
    with_pack_pI = pairs_II[items_pS].sum(axis=1)
    with_pack_pS = np.take_along_axis(with_pack_pI, items_pS, axis=1)
    share_pS = share_I[items_pS]
    n_p, q_p = share_pS.sum(axis=1), with_pack_pS.sum(axis=1)
    n_pSI = (n_p[:, None] - share_pS)[:, :, None] + share_I
    q_pSI = (q_p[:, None] - 2 * with_pack_pS + share_pS)[:, :, None] + share_I
    q_pSI += 2 * (with_pack_pI[:, None, :] - pairs_II[items_pS])
    n_pSI *= n_pSI
    n_pSI /= np.maximum(q_pSI, np.float32(1e-9))  # nobody chose any of them
    n_pSI -= (n_p * n_p / np.maximum(q_p, np.float32(1e-9)))[:, None, None]
    changed: np.ndarray = n_pSI
    return changed


def _change_of_load(packing: Packing, items_pS: np.ndarray) -> np.ndarray:
    """float32 (p, S, I): of the mean over windows of load^8, and of the drift, by slot and the item in its place."""
    load_WI, drift_II = packing.load_WI, packing.drift_II
    total_pSI = np.zeros((*items_pS.shape, load_WI.shape[1]), dtype=np.float32)
    for load_I in load_WI:  # one by one: all windows at once would not fit into the cache
        load_pS = load_I[items_pS]
        load_pSI = (load_pS.sum(axis=1)[:, None] - load_pS)[:, :, None] + load_I
        for _ in range(POWER.bit_length() - 1):
            load_pSI *= load_pSI
        total_pSI += load_pSI
    total_pSI -= (load_WI[:, items_pS].sum(axis=2) ** POWER).sum(axis=0)[:, None, None]
    total_pSI /= len(load_WI)
    with_pack_pI = drift_II[items_pS].sum(axis=1)
    own_I = np.diag(drift_II)
    drift_pSI = with_pack_pI[:, None, :] - drift_II[items_pS]
    drift_pSI *= 2
    drift_pSI += own_I
    drift_pSI += (own_I[items_pS] - 2 * np.take_along_axis(with_pack_pI, items_pS, axis=1))[:, :, None]
    drift_pSI *= DRIFT
    total_pSI += drift_pSI
    return total_pSI


def _change_of_moves(packing: Packing, items_pS: np.ndarray, packs_p: np.ndarray) -> np.ndarray | np.float32:
    """Of price x moved items, by slot and the item that takes its place."""
    if packing.there_PI is None:
        return np.float32(0)
    there_pI = packing.there_PI[packs_p].astype(np.float32)
    stays_pS = np.take_along_axis(there_pI, items_pS, axis=1)
    changed: np.ndarray = np.float32(packing.price) * (stays_pS[:, :, None] - there_pI[:, None, :])
    return changed


def cost(packing: Packing, items_PS: np.ndarray, weight: float) -> float:
    """The formula above in its own words: the slow twin of what the search adds up."""
    total = 0.0
    for pack, items in enumerate(items_PS.tolist()):
        if packing.pairs_II is not None:
            hits = sum(float(packing.share_I[i]) for i in items)
            pairs = sum(float(packing.pairs_II[i, j]) for i in items for j in items)
            total += hits**2 / pairs if pairs else 0.0
        loads = [sum(float(load_I[i]) for i in items) for load_I in packing.load_WI]
        drift = sum(float(packing.drift_II[i, j]) for i in items for j in items)
        total += weight / len(items_PS) * (float(DRIFT) * drift + sum(load**POWER for load in loads) / len(loads))
        if packing.there_PI is not None:
            total += packing.price * sum(not packing.there_PI[pack, i] for i in items)
    return total
