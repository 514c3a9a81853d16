"""The norms that threat models are measured in."""

from __future__ import annotations

NORMS = ("Linf", "L2")
DUAL = {"Linf": 1, "L2": 2}  # the order of the norm that a linear function's slope is measured in
