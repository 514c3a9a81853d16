"""Decide of an image what a small ReLU ensemble can be made to answer inside a Linf ball (`benchmarks.milp`).

An answer is ``robust``, which is proved; ``fooled``, shown by an image that the judge finds fooled in float64; or
``undecided``.

- Mean logits: robust where no class can overtake the label, by intervals, by linear programmes, or by mixed-integer ones.
- Hard votes of three: robust where at most one member can be wrong. Fooled where two agree on a wrong class, or all three
  are wrong. Two that are wrong about different classes are a tie, which goes by the mean probability: no linear function of
  the programme's variables, so that such an image is undecided unless one is found.
- Mean probability: robust where no member can be wrong at all; else undecided unless an image is found.
- Members drawn at random: the largest number that one image fools, between what was found and what was proved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from benchmarks import milp
from benchmarks.milp import LIMIT, SLACK, Array, Encoded, Line, Net, Programme

ROBUST, FOOLED, UNDECIDED = "robust", "fooled", "undecided"
LOGITS, VOTING, SOFTMAX = "logits", "voting", "softmax"
Fools = Callable[[str, Array], bool]  # (vote, input (D,)) -> whether the judge finds it fooled


@cache
def exact_version() -> str:
    """Return the solver's version, and a hash of the code that decides."""
    sources = b"".join(Path(str(file)).read_bytes() for file in (__file__, milp.__file__))
    return f"scipy {scipy.__version__}+{sha256(sources).hexdigest()[:12]}"


@dataclass(eq=False)
class Image:
    """An image (D,) of a class, the networks that look at it, and what is known of it so far."""

    nets: Sequence[Net]
    image_D: Array
    label: int
    eps: float
    fools: Fools
    limit: float = LIMIT
    found: dict[str, str] = field(default_factory=dict)
    by: dict[str, str] = field(default_factory=dict)

    def settle(self) -> dict[str, Any]:
        """Return the record: each vote's answer and what showed it, the fewest and most fooled members, what it took."""
        began = time.perf_counter()
        self._try(self.image_D, "clean")
        encoded = Encoded(self.nets, self.image_D, self.eps, self.limit)
        seconds = {}
        for name, decide in ((LOGITS, self._mean_logits), (VOTING, self._votes)):
            result = decide(encoded)
            seconds[name] = round(time.perf_counter() - began, 2)
            began = time.perf_counter()
        for vote in (LOGITS, VOTING, SOFTMAX):
            self.found.setdefault(vote, UNDECIDED)
        return {
            "label": self.label,
            **self.found,
            "by": self.by,
            "fooled members": result,
            "unstable units": encoded.unstable,
            "seconds": seconds,
        }

    def _try(self, x_D: Array | None, by: str) -> int:
        """Show an input to the judge under every vote that is open; return how many members it fools."""
        if x_D is None:
            return 0
        for vote in (LOGITS, VOTING, SOFTMAX):
            if vote not in self.found and self.fools(vote, x_D):
                self.found[vote], self.by[vote] = FOOLED, by
        return sum(int(net.logits(x_D).argmax()) != self.label for net in self.nets)

    def _prove(self, vote: str, by: str) -> None:
        if vote not in self.found:
            self.found[vote], self.by[vote] = ROBUST, by

    def _mean_logits(self, encoded: Encoded) -> None:
        programme, leads = encoded.programme, encoded.mean_leads(self.label)
        leads = {c: line for c, line in leads.items() if programme.upper(line) >= -SLACK}
        if not leads:
            self._prove(LOGITS, "intervals")
        relaxed = {c: programme.maximise(line, relaxed=True) for c, line in leads.items()}
        order = sorted((c for c in leads if relaxed[c].bound >= -SLACK), key=lambda c: -relaxed[c].bound)
        if not order:
            self._prove(LOGITS, "linear programmes")
        for c in order:
            self._try(relaxed[c].x_D, "linear programmes")
        open_ones = [c for c in order if LOGITS not in self.found and not self._excluded(programme, leads[c])]
        if not open_ones:
            self._prove(LOGITS, "mixed-integer programmes")

    def _excluded(self, programme: Programme, line: Line) -> bool:
        """Tell whether a line is proved to stay below 0; where it does not, show the judge where it does not."""
        for slack in (-SLACK, SLACK):
            case = programme.copy()
            case.require(line.slope_V, slack - line.constant, np.inf)
            solved = case.maximise(case.nothing())
            if solved.bound == -np.inf:
                return slack < 0
            self._try(solved.x_D, "mixed-integer programmes")
            if LOGITS in self.found:
                break
        return False

    def _votes(self, encoded: Encoded) -> list[int]:
        """Decide what follows from how many members can be wrong at once; return the fewest and most of it."""
        fewest, most = self._try(self.image_D, "clean"), len(self.nets)
        for slack in (-SLACK, SLACK):
            programme, count = encoded.wrong(self.label, slack)
            solved = programme.maximise(count)
            if slack < 0:
                most = min(most, max(0, int(np.floor(solved.bound + 1e-6))))
            fewest = max(fewest, self._try(solved.x_D, "mixed-integer programmes"))
            if fewest >= most:
                break
        if most == 0:
            self._prove(SOFTMAX, "no member can be fooled")
        if most <= 1:
            self._prove(VOTING, "mixed-integer programmes")
        for slack in (-SLACK, SLACK):
            if VOTING in self.found:
                break
            agreed = encoded.agreed(self.label, slack)
            solved = agreed.maximise(agreed.nothing())
            self._try(solved.x_D, "mixed-integer programmes")
            if solved.x_D is None:
                self.by.setdefault(VOTING, "a tie" if solved.bound == -np.inf else "out of time")
                break
        return [fewest, most]
