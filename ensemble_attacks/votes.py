"""Provide the votes by which ensembles decide (`ensemble_attacks.models`)."""

from ensemble_attacks.models.mapped import Mapped, ecoc, one_vs_rest, over
from ensemble_attacks.models.pooled import abstaining, stacked, trimmed
from ensemble_attacks.models.routed import cascade, gated
from ensemble_attacks.models.sampled import Dropping, Noisy, Viewed, augmented, mc_dropout, smoothed
from ensemble_attacks.models.votes import Vote, check_vote, weighted

__all__ = [
    "Dropping",
    "Mapped",
    "Noisy",
    "Viewed",
    "Vote",
    "abstaining",
    "augmented",
    "cascade",
    "check_vote",
    "ecoc",
    "gated",
    "mc_dropout",
    "one_vs_rest",
    "over",
    "smoothed",
    "stacked",
    "trimmed",
    "weighted",
]
