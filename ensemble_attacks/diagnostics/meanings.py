"""Say in words what each flag means and what to do about it, and where its source is to be read.

`docs/flags.md` has the same words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ensemble_attacks.diagnostics.findings import Check


@dataclass(frozen=True)
class Meaning:
    """A record of what some flags mean.

    Attributes:
        flags: the names of the checks.
        seen: what was seen.
        remedy: what to do.
    """

    flags: tuple[str, ...]
    seen: str
    remedy: str


MEANINGS = (
    Meaning(
        ("frontend", "frontend_gap"),
        "parts before the classifier; passing them by fools more",
        "`bpda`, `bpda-mora`; if they are far from the identity, `front-end-reversal`",
    ),
    Meaning(
        ("aggregation", "transfer_gap"),
        "the mean of the members' logits is easier to attack than the model",
        "`crossmax-transfer`, `mora`",
    ),
    Meaning(
        ("protocol",),
        "`aggregate(member_logits(x))` predicts another class than the model",
        "mend it, or name members and vote (`as_ensemble`)",
    ),
    Meaning(
        ("random", "reseeds"),
        "scores differ between calls, or the global generator is reset in each",
        "`eot-apgd`, `--draws 10`; never one lucky draw",
    ),
    Meaning(
        ("stateful", "batch_dependence", "training_mode"),
        "scores depend on more than the image",
        "make the model a function of the image first",
    ),
    Meaning(
        ("probabilities", "saturation"),
        "cross-entropy underflows",
        "return logits; losses on the margin, `mora`, `apgd-t`",
    ),
    Meaning(
        ("zero_gradients", "shattered", "detached_member"),
        "the gradient is missing, or noise",
        "a surrogate, `square`",
    ),
    Meaning(
        ("scale",),
        "the margin of the scores fools more than their cross-entropy: temperature",
        "losses that do not depend on the scale, `mora`, `apgd-t`",
    ),
    Meaning(
        ("non_finite",),
        "NaN scores, or an infinite best one; gradients that are not finite",
        "they count as neither robust nor fooled",
    ),
    Meaning(
        ("single_step", "noise", "unbounded", "not_converged"),
        "attacks behave as they cannot if they work (Carlini et al. 2019)",
        "more steps, another surrogate, before any number is believed",
    ),
    Meaning(
        ("unstable_predictions", "silent_success", "incomplete_optimization", "unconstrained_attack_failure"),
        "the indicators I2, I3, I4 and I6 of Pintor et al. (2022); I1 is `zero_gradients`",
        "the attack fails for a reason of its own: another surrogate, more steps, the best iterate instead of the last",
    ),
    Meaning(
        ("attack",),
        "the attack ends with an error",
        "mend it, or name another",
    ),
    Meaning(
        ("binarization",),
        "of binary tasks with a known adversarial example, the attack solves less than 95% (Zimmermann et al. 2022)",
        "the attack is too weak for this model: another surrogate",
    ),
)
PAPERS = {  # the sources of the checks, where they are to be read
    "C19": ("Carlini et al., 2019", "https://arxiv.org/abs/1902.06705"),
    "A18": ("Athalye et al., ICML 2018", "https://arxiv.org/abs/1802.00420"),
    "P22": ("Pintor et al., NeurIPS 2022", "https://arxiv.org/abs/2106.09947"),
    "Z22": ("Zimmermann et al., NeurIPS 2022", "https://arxiv.org/abs/2206.13991"),
    "CH20": ("Croce & Hein, ICML 2020", "https://arxiv.org/abs/2003.01690"),
}
CITED = re.compile(r"\[(?P<key>[A-Z]+[0-9]{2})\]|arXiv:(?P<number>[0-9]{4}\.[0-9]{5})")


def meaning_of(flag: str) -> Meaning | None:
    """Return what a flag means; ``None`` for a check that could not be carried out."""
    return next((meaning for meaning in MEANINGS if flag in meaning.flags), None)


def sources_of(check: Check) -> Iterator[tuple[str, str]]:
    """Yield the text of a check's source piece by piece, and beside each the address that it leads to, or nothing."""
    end = 0
    for match in CITED.finditer(check.source):
        if match.start() > end:
            yield check.source[end : match.start()], ""
        text, address = match[0], f"https://arxiv.org/abs/{match['number']}"
        if match["key"] in PAPERS:
            text, address = PAPERS[match["key"]]
        yield text, address if match["number"] or match["key"] in PAPERS else ""
        end = match.end()
    if end < len(check.source):
        yield check.source[end:], ""
