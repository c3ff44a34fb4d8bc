"""Flows that collide: equal-cost multi-path hashing under one top-of-rack switch (MegaScale, section 3.6). SIMULATED.

Every flow that leaves the rack is hashed to one of the uplinks, blindly. Two that meet share it. The paper's remedies
are here as numbers: flows of half an uplink's rate (a 400G port split into two of 200G), and talkative machines under
one switch, so that fewer flows leave it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Collisions:
    """Over many hashings: ``none``: share of them without any uplink overbooked; ``mean`` and ``slowest``: rate of the
    mean and the slowest flow as a share of the rate it asks for. A ring is as fast as its slowest flow."""

    none: float
    mean: float
    slowest: float


def free_of_collisions(flows: int, uplinks: int) -> float:
    """The birthday problem: the probability that no two of the flows meet."""
    if flows > uplinks:
        return 0.0
    return math.exp(math.lgamma(uplinks + 1) - math.lgamma(uplinks - flows + 1) - flows * math.log(uplinks))


def hash_flows(
    flows: int, uplinks: int, flow_gbps: float, uplink_gbps: float, local: float = 0.0, draws: int = 2000, seed: int = 0
) -> Collisions:
    """``flows`` leave a rack with ``uplinks``; a share ``local`` of them stays under the switch and meets nobody.

    An overbooked uplink is shared equally. Raises ValueError.
    """
    if flows < 1 or uplinks < 1 or not flow_gbps > 0 or not uplink_gbps > 0 or not 0 <= local <= 1 or draws < 1:
        raise ValueError("flows, uplinks, rates and draws must be above 0, and local a share from 0 to 1")
    rng = np.random.default_rng(seed)
    leaving = round(flows * (1 - local))
    chosen = rng.integers(0, uplinks, (draws, leaving))
    rows = np.arange(draws)[:, None]
    load = np.zeros((draws, uplinks), dtype=int)
    np.add.at(load, (rows, chosen), 1)
    rate = np.minimum(1.0, uplink_gbps / (flow_gbps * np.maximum(load, 1)))  # of each flow on an uplink
    of_flows = rate[rows, chosen]
    total = (of_flows.sum(1) + flows - leaving) / flows
    slowest = of_flows.min(1) if leaving else np.ones(draws)
    return Collisions(float((slowest >= 1).mean()), float(total.mean()), float(slowest.mean()))


def remedies(draws: int = 2000, seed: int = 0) -> dict[str, Collisions]:
    """A switch of the paper's: 32 uplinks of 400G, and as much bandwidth below."""
    return {
        "400G flows": hash_flows(32, 32, 400, 400, 0.0, draws, seed),
        "200G flows (split ports)": hash_flows(64, 32, 200, 400, 0.0, draws, seed),
        "400G flows, half stay in the rack": hash_flows(32, 32, 400, 400, 0.5, draws, seed),
        "200G flows, half stay in the rack": hash_flows(64, 32, 200, 400, 0.5, draws, seed),
        "200G flows, 9 of 10 stay in the rack": hash_flows(64, 32, 200, 400, 0.9, draws, seed),
    }
