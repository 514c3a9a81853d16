"""Run the attacks that an AutoAttack has chosen, one after the other, and keep of every image what is worst."""

from __future__ import annotations

import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.appeal import beyond_rounding, contradicted
from ensemble_attacks.errors import none_completed, out_of_memory, reason
from ensemble_attacks.files import digest
from ensemble_attacks.hosts.choice import Name
from ensemble_attacks.hosts.flags import FAILED, NON_FINITE, Flag, of_claim, of_disagreement, of_stages
from ensemble_attacks.hosts.identity import described, of_slot
from ensemble_attacks.hosts.slots import SLOTS
from ensemble_attacks.hosts.state import State
from ensemble_attacks.hosts.verdict import SEEN, Verdict, scores, verdict
from ensemble_attacks.judge import judge, outside
from ensemble_attacks.norms import NORMS
from ensemble_attacks.scores import margin
from ensemble_attacks.version import __version__


class Run:
    """A run of an adversary, an `AutoAttack`, on images (N, C, H, W) and labels (N,), by ``bs`` at a time.

    Args:
        chosen: the attacks, in order, by what they are called.
        path: a file to which the run is saved, and from which it goes on; ``None``: none.
    """

    def __init__(self, adversary: Any, x: Tensor, y: Tensor, bs: int, chosen: dict[str, Name], path: Path | None) -> None:
        self.adversary, self.x, self.y, self.bs, self.chosen = adversary, x, y, bs, chosen
        self.errors: dict[str, Exception] = {}
        self.state = self._begun(path)

    def finished(self) -> State:
        """Run what has not been run, tell the adversary what was found, and return the state.

        Raises:
            TypeError, ValueError, AttackFailedError: Where no attack was run to its end.
        """
        state = self.state
        try:
            for called, name in self.chosen.items():
                if called not in state.stages and not self._settled():
                    self._attack(called, name)
        finally:
            state.save(now=True)
        if self.errors and not state.stages:
            raise none_completed(self.errors)
        self._conclude()
        return state

    def _begun(self, path: Path | None) -> State:
        """Return the state of this run: as stored, or as it is before the first attack."""
        adversary, x, y = self.adversary, self.x, self.y
        identity = {
            "version": adversary.version,
            "order": list(self.chosen),
            "attacks": {called: self._described(name) for called, name in self.chosen.items()},
            "norm": adversary.norm,
            "eps": adversary.epsilon,
            "seed": adversary.seed,
            "bs": self.bs,
            "images": digest(x, y),
            "draws": adversary.draws,
            "eot_iter": adversary.eot_iter,
            "model": digest(*adversary.model.state_dict().values(), scores(adversary.model, x[:SEEN], adversary.device)),
            "package": __version__,
        } | ({} if adversary.steps is None else {"steps": adversary.steps})
        if path is not None and path.exists():
            state = State.load(path, identity, x.device)
            adversary.flags = [Flag(*flag) for flag in state.flags]
            adversary._say(f"going on from {path}: {', '.join(state.stages) or 'no attack'} done")
            return state
        parts = zip(*map(self._verdict, x.split(self.bs), y.split(self.bs)), strict=True)
        right, predicted, finite = (torch.cat(part) for part in parts)
        if not finite.all():
            count = int((~finite).sum())
            adversary._flag(NON_FINITE, count, "so many clean images have NaN or infinite scores: they count as not robust")
        nobody = torch.zeros_like(finite)
        state = State(x.detach().clone(), right * finite, predicted, nobody, nobody.clone(), identity=identity, path=path)
        adversary._say(f"initial accuracy: {state.robust.double().mean():.2%}")
        state.flags = [astuple(flag) for flag in adversary.flags]
        return state

    def _described(self, name: Name) -> Any:
        """Return what decides an attack's result, beside what the run's identity says."""
        attacked = self.adversary.model, self.adversary._twin
        if name in SLOTS:
            return of_slot(self.adversary, str(name), attacked)
        return name if isinstance(name, str) else described(name, attacked)

    def _attack(self, called: str, name: Name) -> None:
        """Run one attack on what is robust; where it raises, note the error, flag it, and keep what was found before."""
        adversary, state = self.adversary, self.state
        if called != state.current:
            state.current, state.pending = called, state.robust
        began, rejected, unsound = time.perf_counter(), 0, 0
        if state.failed.pop(called, None):  # in the run that is gone on with
            adversary.flags = [
                f for f in adversary.flags if f.name != FAILED or not f.message.startswith(f"{called} is left out")
            ]
        for rows in torch.nonzero(state.pending).squeeze(-1).split(self.bs) if state.pending.any() else ():
            clean, labels = self.x[rows], self.y[rows]
            try:
                given = clean.to(adversary.device), labels.to(adversary.device)
                images, fooled = adversary._craft(name, *given)
                images = images.detach().to(clean)
                if images.shape != clean.shape:
                    raise ValueError(f"it returned images of shape {tuple(images.shape)}, not {tuple(clean.shape)}")
            except Exception as error:  # whatever an attack raises: it costs that attack
                if out_of_memory(error):
                    raise
                self.errors[called], state.failed[called] = error, reason(error)
                adversary._flag(FAILED, int(state.pending.sum()), f"{called} is left out on so many images: {reason(error)}")
                break
            left = outside(clean, images, eps=adversary.epsilon, norm=adversary.norm)
            right, predicted, finite = self._verdict(images, labels)
            unsound += int((~finite & ~left).sum())
            state.claimed[rows] |= self._claimed(images, labels, fooled, (right > 0.5) & finite & ~left)
            worse = (right < state.right[rows]) & finite & ~left
            state.x_adv[rows[worse]], state.predicted[rows[worse]] = images[worse], predicted[worse]
            state.right[rows[worse]] = right[worse]
            state.pending[rows] = False
            state.save()
            rejected += int(left.sum())
            adversary._say(f"{called}: {int((~state.robust[rows]).sum())} of {len(rows)} fooled")
        if rejected:
            adversary._flag(
                "outside_ball", rejected, f"so many images of {called} left the ball or the box, and do not count"
            )
        if unsound:
            adversary._flag(
                NON_FINITE,
                unsound,
                f"so many images of {called} have NaN or infinite scores: no success, and not robust either",
            )
        state.flags = [astuple(flag) for flag in adversary.flags]
        if called in state.failed:
            state.save(now=True)
            return
        state.stages[called] = state.robust
        state.save(now=True)
        adversary.on_attack(called)
        spent = time.perf_counter() - began
        adversary._say(f"robust accuracy after {called.upper()}: {state.robust.double().mean():.2%} ({spent:.1f} s)")

    def _claimed(self, images: Tensor, labels: Tensor, fooled: Tensor | None, robust: Tensor) -> Tensor:
        """Return which robust images (N, ...) the attack saw fooled, or get another answer if asked otherwise, (N,) bool.

        Of a random model there are none: a draw of its own is no contradiction.
        """
        claimed = torch.zeros_like(robust)
        if self.adversary.random or not robust.any():
            return claimed
        rows = torch.nonzero(robust).squeeze(-1)
        seed = self.adversary.seed or 0
        claimed[rows] = contradicted(self.adversary.model, images[rows], batch_size=self.bs, seed=seed).to(claimed)
        if fooled is not None and (seen := robust & fooled.to(robust)).any():
            answer = scores(self.adversary.model, images[seen], self.adversary.device)
            claimed[seen] |= beyond_rounding(margin(answer, labels[seen].cpu()).abs(), answer).to(
                claimed
            )  # a twin rounds otherwise
        return claimed

    def _settled(self) -> bool:
        """Tell whether, in version ``"auto"``, the last two of at least three attacks moved nothing."""
        counts = [int(robust.sum()) for robust in self.state.stages.values()]
        if self.adversary.version != "auto" or len(counts) < 3 or counts[-1] < counts[-3]:
            return False
        self.adversary._say("the last two attacks moved nothing: the others are left out")
        return True

    def _verdict(self, images: Tensor, labels: Tensor) -> Verdict:
        adversary = self.adversary
        draws = adversary.draws if adversary.random else None
        return verdict(adversary.model, images, labels, device=adversary.device, draws=draws)

    def _conclude(self) -> None:
        """Tell the adversary what was found."""
        adversary, state = self.adversary, self.state
        adversary.stages, adversary.robust, adversary.failed = dict(state.stages), state.robust, dict(state.failed)
        adversary.disagreement = state.claimed & state.robust
        claimed = of_claim(adversary.model, state.x_adv, self.bs, "adversarial images")
        for flag in (*of_stages(adversary.stages), *claimed, *of_disagreement(int(adversary.disagreement.sum()))):
            adversary._flag(*astuple(flag))
        adversary.robust_accuracy = adversary.robust.double().mean().item()
        if adversary.random and NORMS[adversary.norm].attacked:
            settings = dict(eps=adversary.epsilon, norm=adversary.norm, draws=adversary.draws, batch_size=self.bs)
            adversary.robust_accuracy = judge(adversary.model, self.x, self.y, state.x_adv, **settings).accuracy
        adversary._say(f"robust accuracy: {adversary.robust_accuracy:.2%}")
