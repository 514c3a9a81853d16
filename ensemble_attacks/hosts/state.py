"""Store how far a run of AutoAttack has come, so that it can go on."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ensemble_attacks.files import write_whole
from ensemble_attacks.hosts.identity import difference

SAVE_EVERY = 60.0  # seconds
TENSORS = ("x_adv", "right", "predicted", "pending")


@dataclass(eq=False)
class State:
    """A record of how far a run has come, which is stored as safetensors and replaced in one piece.

    Attributes:
        x_adv: the images so far, (N, C, H, W): of every sample, the one that is right in the fewest draws.
        right, predicted: the share of right draws, float64, and the last prediction, (N,).
        pending: the samples that the attack called ``current`` has yet to attack, (N,).
        stages: the robust samples after each attack that has finished.
        current: the name of the attack that is running, or ran last.
        identity: what a run must have in common with the stored one.
        path: the file in which it is stored; ``None``: it is not stored.
        flags: the flags of `AutoAttack` so far.
        failed: by attack that raised, why; an attack that goes on from the state is tried again.
        saved: when it was last stored, in seconds of the monotonic clock.
    """

    x_adv: Tensor
    right: Tensor
    predicted: Tensor
    pending: Tensor
    stages: dict[str, Tensor] = field(default_factory=dict)
    current: str = ""
    identity: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    flags: list[Any] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    saved: float = -math.inf

    @property
    def robust(self) -> Tensor:
        """Return the samples that are right in most draws, (N,) bool."""
        return self.right > 0.5

    def save(self, now: bool = False) -> None:
        """Store the state, but not more often than every `SAVE_EVERY` seconds, unless ``now``."""
        if self.path is None or (not now and time.monotonic() - self.saved < SAVE_EVERY):
            return
        tensors = {name: getattr(self, name) for name in TENSORS} | {f"stage {n}": s for n, s in self.stages.items()}
        tensors = {
            name: (t.to(torch.uint8) if t.dtype == torch.bool else t).cpu().contiguous() for name, t in tensors.items()
        }
        about = {key: getattr(self, key) for key in ("identity", "current", "flags", "failed")} | {
            "stages": list(self.stages)
        }
        write_whole(self.path, save(tensors, metadata={"state": json.dumps(about)}))
        self.saved = time.monotonic()

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any], device: torch.device) -> State:
        """Read the state of the same run.

        Raises:
            ValueError: Where the file is no state, or one of another run.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
            x_adv, right, predicted, pending = (tensors[name] for name in TENSORS)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"state_path {str(path)!r} holds no state of this AutoAttack: choose another") from error
        asked = json.loads(json.dumps(identity))
        if found := difference({key: about["identity"].get(key) for key in asked}, asked):
            key, value, wanted = found
            raise ValueError(
                f"state_path {str(path)!r} is of a run with {key} = {value!r}, not {wanted!r}: choose another, or delete it"
            )
        stages = {name: tensors[f"stage {name}"].bool() for name in about["stages"]}
        state = cls(x_adv, right, predicted, pending.bool(), stages, about["current"], identity, path)
        state.flags, state.failed = about["flags"], about.get("failed", {})
        return state
