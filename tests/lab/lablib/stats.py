# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures from rounds and alternating pairs, with their 95 % confidence intervals."""

import math
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
       2.052, 2.048, 2.045, 2.042)


@dataclass
class Mean:
    """A mean of @rounds values; @low and @high bound it with 95 % confidence."""
    value: float
    low: float
    high: float
    rounds: int

    def __str__(self):
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}, {self.rounds} rounds)"


@dataclass
class Ratio:
    """What was measured over its baseline; @low and @high bound it with 95 % confidence."""
    value: float
    low: float
    high: float
    pairs: int

    def __str__(self):
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"

    def narrow(self, width: float) -> bool:
        return self.pairs >= 5 and self.high - self.low <= 2 * width * self.value


def mean(values) -> Mean:
    """The mean of @values, of which a single one has no bounds."""
    n, value = len(values), sum(values) / len(values)
    half = math.inf
    if n > 1:
        var = sum((x - value) ** 2 for x in values) / (n - 1)
        half = T95[min(n - 2, len(T95) - 1)] * math.sqrt(var / n)
    return Mean(value, value - half, value + half, n)


def ratio(pairs) -> Ratio:
    """The geometric mean of measured/baseline over @pairs of (baseline, measured).

    Pairs, because the machine drifts: both of a pair were taken one after the other.
    """
    m = mean([math.log(m / b) for b, m in pairs])
    return Ratio(math.exp(m.value), math.exp(m.low), math.exp(m.high), m.rounds)


def verdict(interval, goal) -> str:
    """What to say after @interval, by its worse end; nothing without a goal."""
    if not goal:
        return ""
    if interval.high <= goal:
        how = "met"
    elif interval.low > goal:
        how = "missed"
    else:
        how = f"open, {'met' if interval.value <= goal else 'missed'} by the mean"
    return f"; goal at most {goal:g}: {how}"
