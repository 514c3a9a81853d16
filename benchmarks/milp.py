"""What a small ReLU ensemble can be made to do inside a Linf ball, exactly: mixed-integer programmes, solved by HiGHS.

An image's ball and the box [0, 1] are one box of inputs. A hidden unit that can be both on and off in it is one binary
variable (Tjeng, Xiao & Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer Programming", ICLR 2019); with
one hidden layer the interval bounds of its input are exact. All members share the input. HiGHS works to a tolerance, so that
what holds for sure is proved with `SLACK` to spare, and what can happen is an input for the caller to judge.

Shape suffixes: D inputs, H hidden units, K classes, V variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

Array = NDArray[np.float64]
SLACK = 1e-4  # of logits: far above HiGHS's tolerances (1e-6 of constraints and integers), far below the margins that matter
LIMIT = 60.0  # seconds for one programme
OPTIMAL, OUT_OF_TIME, INFEASIBLE = 0, 1, 2  # of scipy's statuses


@dataclass(frozen=True, eq=False)
class Net:
    """A network ``W2 relu(W1 x + b1) + b2`` in float64."""

    w1_HD: Array
    b1_H: Array
    w2_KH: Array
    b2_K: Array

    @classmethod
    def of(cls, module: nn.Module) -> Net:
        """Return the numbers of a module of two linear layers with a ReLU between."""
        linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
        first, second = ((p.weight.detach().double().numpy(), p.bias.detach().double().numpy()) for p in linear)
        return cls(*first, *second)

    def logits(self, x_D: Array) -> Array:
        return self.w2_KH @ np.maximum(self.w1_HD @ x_D + self.b1_H, 0) + self.b2_K


@dataclass(frozen=True, eq=False)
class Line:
    """A linear function of a programme's variables."""

    slope_V: Array
    constant: float

    def __sub__(self, other: Line) -> Line:
        return Line(self.slope_V - other.slope_V, self.constant - other.constant)

    def over(self, variables: int) -> Array:
        """Return the slope over more variables, the further ones 0."""
        return np.concatenate([self.slope_V, np.zeros(variables - len(self.slope_V))])


def total(lines: Sequence[Line]) -> Line:
    return Line(np.sum([line.slope_V for line in lines], axis=0), sum(line.constant for line in lines))


@dataclass(frozen=True, eq=False)
class Solved:
    """What HiGHS found: a proven upper bound of the maximum, -inf where nothing is feasible, and an input, if any."""

    bound: float
    x_D: Array | None


@dataclass(eq=False)
class Programme:
    """Variables with bounds, some of them whole numbers, and rows ``low <= row . v <= high``; the first D are the input."""

    inputs: int
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    rows: list[tuple[Array, float, float]] = field(default_factory=list)
    limit: float = LIMIT

    def add(self, low: Sequence[float] | Array, high: Sequence[float] | Array, whole: bool = False) -> NDArray[np.int64]:
        """Add variables, and return their numbers."""
        first = len(self.low)
        self.low += [float(v) for v in low]
        self.high += [float(v) for v in high]
        self.whole += [whole] * len(low)
        return np.arange(first, len(self.low))

    def copy(self) -> Programme:
        """Return a programme to which variables and rows can be added without changing this one."""
        return Programme(self.inputs, [*self.low], [*self.high], [*self.whole], [*self.rows], self.limit)

    def nothing(self) -> Line:
        """Return the line that is 0 everywhere, whose maximum says whether there is any input at all."""
        return Line(np.zeros(len(self.low)), 0.0)

    def require(self, slope_V: Array, low: float, high: float) -> None:
        self.rows.append((slope_V, low, high))

    def upper(self, line: Line) -> float:
        """Return an upper bound of a line by the variables' bounds alone."""
        low, high = np.array(self.low[: len(line.slope_V)]), np.array(self.high[: len(line.slope_V)])
        return float(np.where(line.slope_V > 0, line.slope_V * high, line.slope_V * low).sum() + line.constant)

    def maximise(self, line: Line, relaxed: bool = False) -> Solved:
        """Return the maximum of a line; ``relaxed``: of the linear programme without whole numbers, an upper bound of it."""
        count = len(self.low)
        matrix = (
            np.stack([np.concatenate([row, np.zeros(count - len(row))]) for row, _, _ in self.rows]) if self.rows else None
        )
        limits = [np.array([row[side] for row in self.rows]) for side in (1, 2)]
        with quiet():
            found = milp(
                -line.over(count),
                integrality=np.zeros(count) if relaxed else np.array(self.whole, float),
                bounds=Bounds(np.array(self.low), np.array(self.high)),
                constraints=[] if matrix is None else [LinearConstraint(matrix, *limits)],
                options={"mip_rel_gap": 0.0, "time_limit": self.limit},
            )
        if found.status == INFEASIBLE:
            return Solved(-np.inf, None)
        x_D = None if found.x is None else np.clip(found.x[: self.inputs], self.low[: self.inputs], self.high[: self.inputs])
        dual = found.mip_dual_bound if found.mip_dual_bound is not None else (found.fun if found.status == OPTIMAL else None)
        return Solved(np.inf if dual is None else -float(dual) + line.constant, x_D)


class Encoded:
    """The members of an ensemble over the ball of an image, (D,): a `Programme`, and their logits as lines of it.

    Attributes:
        logits: for each member, a line for each class.
        unstable: how many hidden units can be both on and off.
    """

    def __init__(self, nets: Sequence[Net], image_D: Array, eps: float, limit: float = LIMIT) -> None:
        low_D, high_D = np.maximum(image_D - eps, 0.0), np.minimum(image_D + eps, 1.0)
        self.nets, self.unstable = nets, 0
        self.programme = Programme(len(image_D), limit=limit)
        self.programme.add(low_D, high_D)
        parts = [self._hidden(net, low_D, high_D) for net in nets]
        count = len(self.programme.low)
        self.programme.rows = [(np.pad(r, (0, count - len(r))), low, high) for r, low, high in self.programme.rows]
        self.logits: list[list[Line]] = []
        for net, (slopes, constants_H) in zip(nets, parts, strict=True):
            slopes_HV = np.stack([np.pad(slope, (0, count - len(slope))) for slope in slopes])
            z_KV, z_K = net.w2_KH @ slopes_HV, net.w2_KH @ constants_H + net.b2_K
            self.logits.append([Line(z_V, float(z)) for z_V, z in zip(z_KV, z_K, strict=True)])

    def _hidden(self, net: Net, low_D: Array, high_D: Array) -> tuple[list[Array], Array]:
        """Return each hidden unit's output, as slope and constant; add what those that are not linear here need."""
        plus, minus = np.maximum(net.w1_HD, 0), np.minimum(net.w1_HD, 0)
        lowest_H, highest_H = (plus @ a + minus @ b + net.b1_H for a, b in ((low_D, high_D), (high_D, low_D)))
        slopes, constants_H = [], np.zeros(len(lowest_H))
        for unit, (low, high) in enumerate(zip(lowest_H, highest_H, strict=True)):
            if high <= 0:
                slopes.append(np.zeros(self.programme.inputs))
            elif low >= 0:
                slopes.append(net.w1_HD[unit])
                constants_H[unit] = net.b1_H[unit]
            else:
                slopes.append(self._relu(net.w1_HD[unit], float(net.b1_H[unit]), float(low), float(high)))
        return slopes, constants_H

    def _relu(self, weight_D: Array, bias: float, low: float, high: float) -> Array:
        """Add h = relu(a), a = w x + b in [low, high]: h >= a, h <= a - low (1 - t), 0 <= h <= high t, t in {0, 1}."""
        (output,) = self.programme.add([0.0], [high])
        (on,) = self.programme.add([0.0], [1.0], whole=True)
        self.unstable += 1
        above, beside, below = (np.zeros(on + 1) for _ in range(3))
        above[: len(weight_D)], above[output] = -weight_D, 1
        self.programme.require(above, bias, np.inf)
        beside[: len(weight_D)], beside[output], beside[on] = -weight_D, 1, -low
        self.programme.require(beside, -np.inf, bias - low)
        below[output], below[on] = 1, -high
        self.programme.require(below, -np.inf, 0.0)
        slope = np.zeros(output + 1)
        slope[output] = 1
        return slope

    def leads(self, member: int, label: int) -> dict[int, Line]:
        """Return by how much each other class leads the label in a member, as lines."""
        z = self.logits[member]
        return {c: z[c] - z[label] for c in range(len(z)) if c != label}

    def mean_leads(self, label: int) -> dict[int, Line]:
        """Return by how much each other class leads the label in the mean logits, as lines."""
        leads = [self.leads(m, label) for m in range(len(self.logits))]
        sums = {c: total([lead[c] for lead in leads]) for c in leads[0]}
        return {c: Line(line.slope_V / len(leads), line.constant / len(leads)) for c, line in sums.items()}

    def wrong(self, label: int, slack: float) -> tuple[Programme, Line]:
        """Return a programme of wrong members, and their number as a line.

        A member counts where another class leads the label by ``slack`` at least; a negative one counts near misses. Classes
        that cannot by interval bounds are left out.
        """
        programme, chosen = self.programme.copy(), [np.zeros(0, dtype=np.int64)]
        for member in range(len(self.logits)):
            possible = [line for line in self.leads(member, label).values() if self.programme.upper(line) >= slack]
            binaries = programme.add([0.0] * len(possible), [1.0] * len(possible), whole=True)
            for binary, line in zip(binaries, possible, strict=True):
                self._if(programme, int(binary), line, slack)
            if possible:
                programme.require(_ones(binaries, len(programme.low)), -np.inf, 1.0)
            chosen.append(binaries)
        return programme, Line(_ones(np.concatenate(chosen), len(programme.low)), 0.0)

    def _if(self, programme: Programme, binary: int, line: Line, least: float) -> None:
        """Require that a line is at least ``least`` where the binary is 1."""
        lowest = -self.programme.upper(Line(-line.slope_V, -line.constant))
        row = np.zeros(max(binary + 1, len(line.slope_V)))
        row[: len(line.slope_V)] = line.slope_V
        row[binary] = -(least - lowest)
        programme.require(row, lowest - line.constant, np.inf)

    def agreed(self, label: int, slack: float) -> Programme:
        """Return a programme in which some wrong class is the best of two members, by ``slack``."""
        programme, by_class = self.programme.copy(), [np.zeros(0, dtype=np.int64)]
        for c in range(len(self.logits[0])):
            ahead = [[z[c] - z[other] for other in range(len(z)) if other != c] for z in self.logits]
            ahead = [lines for lines in ahead if min(self.programme.upper(line) for line in lines) >= slack]
            if c == label or len(ahead) < 2:
                continue
            binaries = programme.add([0.0] * len(ahead), [1.0] * len(ahead), whole=True)
            for binary, lines in zip(binaries, ahead, strict=True):
                for line in lines:
                    self._if(programme, int(binary), line, slack)
            this = programme.add([0.0], [1.0], whole=True)
            count = len(programme.low)
            programme.require(_ones(binaries, count) - 2 * _ones(this, count), 0.0, np.inf)
            by_class.append(this)
        programme.require(_ones(np.concatenate(by_class), len(programme.low)), 1.0, np.inf)
        return programme


def _ones(columns: NDArray[np.int64], count: int) -> Array:
    row = np.zeros(count)
    row[columns] = 1
    return row


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what HiGHS prints past Python out of the output."""
    null, kept = os.open(os.devnull, os.O_WRONLY), os.dup(1)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(null)
        os.close(kept)
