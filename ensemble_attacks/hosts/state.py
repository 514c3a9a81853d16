"""Store how far a run of AutoAttack has come, so that it can go on."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ensemble_attacks.files import FLOATING, read_tensors, write_whole
from ensemble_attacks.hosts.identity import difference
from ensemble_attacks.schema import StoredState, check, parse

SAVE_EVERY = 60.0  # seconds
MASKS = (torch.uint8,)
TENSORS = {  # by name, the types that they can have
    "x_adv": FLOATING,
    "right": (torch.float64,),
    "predicted": (torch.int64,),
    "pending": MASKS,
    "claimed": MASKS,
}


@dataclass(eq=False)
class State:
    """A record of how far a run has come, which is stored as safetensors and replaced in one piece.

    Attributes:
        x_adv: the images so far, (N, C, H, W): of every sample, the one that is right in the fewest draws.
        right, predicted: the share of right draws, float64, and the last prediction, (N,).
        pending: the samples that the attack called ``current`` has yet to attack, (N,).
        claimed: the samples of which an attack saw an image fool the model that does not when it is judged, (N,).
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
    claimed: Tensor
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
            tensors, about = _read(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"state_path {str(path)!r} holds no state of this AutoAttack ({error}): choose another"
            ) from error
        asked = json.loads(json.dumps(identity))
        if found := difference({key: about["identity"].get(key) for key in asked}, asked):
            key, value, wanted = found
            raise ValueError(
                f"state_path {str(path)!r} is of a run with {key} = {value!r}, not {wanted!r}: choose another, or delete it"
            )
        tensors = {name: (t.bool() if t.dtype in MASKS else t).to(device) for name, t in tensors.items()}
        stages = {name: tensors[f"stage {name}"] for name in about["stages"]}
        x_adv, right, predicted, pending, claimed = (tensors[name] for name in TENSORS)
        state = cls(x_adv, right, predicted, pending, claimed, stages, about["current"], identity, path)
        state.flags, state.failed = about["flags"], about["failed"]
        return state


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state and what it says of itself; raise a `ValueError` where they are none."""
    mapped, beside = read_tensors(path)
    about = parse(beside.get("state", "").encode())
    check(about, StoredState)
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}  # whatever becomes of the file
    expected = TENSORS | {f"stage {name}": MASKS for name in about["stages"]}
    if differing := sorted(set(expected) ^ set(tensors)):
        raise ValueError(f"the tensor {differing[0][:60]!r} is {'missing' if differing[0] in expected else 'unknown'}")
    images = len(tensors["pending"])
    for name, kinds in expected.items():
        tensor = tensors[name]
        fits = len(tensor) == images and tensor.dim() == 1 if name != "x_adv" else tensor.dim() > 1 and len(tensor) == images
        if not fits or tensor.dtype not in kinds:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected {kinds[0]} of {images} images")
    return tensors, about
