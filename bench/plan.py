"""How much is measured: by time in `quick`, by count in `full`."""

from __future__ import annotations

from dataclasses import dataclass

from bench.rounds import Limit
from bench.stats import PAIRS_NEEDED


@dataclass(frozen=True, slots=True)
class Plan:
    """The limits of one mode."""

    mode: str
    windows: Limit
    copying: Limit
    branching: Limit
    forking: Limit
    lag_mib: int
    """Data of each of the two sources whose pre-copies run at once."""


QUICK = Plan(
    "quick",
    windows=Limit(400, seconds=40),
    copying=Limit(PAIRS_NEEDED, seconds=30),
    branching=Limit(PAIRS_NEEDED, seconds=25),
    forking=Limit(PAIRS_NEEDED, seconds=30),
    lag_mib=1024,
)
"""About three minutes with what is made and removed around the trials. The sources of the loop's
lag have 4 GiB each, of which a quarter is data."""

FULL = Plan(
    "full",
    windows=Limit(2 * PAIRS_NEEDED),
    copying=Limit(PAIRS_NEEDED),
    branching=Limit(PAIRS_NEEDED),
    forking=Limit(PAIRS_NEEDED),
    lag_mib=4000,
)
"""No time limit. Windows are short and their goal is near, so there are more of them."""

PLANS = {plan.mode: plan for plan in (QUICK, FULL)}
