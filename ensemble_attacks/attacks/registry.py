"""List the attacks by name, each as one record: this package's, AutoAttack's, torchattacks' (``torchattacks:PGD?steps=50``),
and those that other packages register.

Another package registers an attack as an entry point of the group ``ensemble_attacks.attacks``: a name, and a torchattacks
``Attack`` class or any function of a model that makes one. Of ``norm``, ``eps``, ``seed``, ``batch_size`` and ``eot_iter``,
it is given those that it has as parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ensemble_attacks.attacks.peers import PEER, adapted, peer
from ensemble_attacks.attacks.record import FRONTEND, MEMBERS, PROBABILITIES, NamedAttack
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.names import split_options

if TYPE_CHECKING:
    from torch import nn
    from torchattacks.attack import Attack

Maker = Callable[..., "Attack"]

GROUP = "ensemble_attacks.attacks"
MINIMAL = "minimal:"  # before the name of the attack whose radius is searched
LOOK = 1e-3  # how far zero-order attacks look along each direction, as a share of the box's width
EOT_ITER = 20  # draws of every iterate, where the user does not say
ALL_NORMS = ("Linf", "L2", "L1")
CROCE = "Croce & Hein, ICML 2020"
BOYTSOV = "arXiv:2402.17018"


def _class(name: str) -> Any:
    """Import an attack of this package, ``module.Class``; not before it is made, so that help needs no torch."""
    module, _, attack = name.rpartition(".")
    return getattr(import_module(f"ensemble_attacks.attacks.{module}"), attack)


def _as(name: str, inside: str | None = None) -> Callable[[Maker], Maker]:
    """Say whose arguments the options of an attack are, and, unless it is the default, of the one ``inside`` (`options`)."""

    def mark(make: Maker) -> Maker:
        vars(make)["attack"] = partial(_class, name)
        if inside is not None:
            vars(make)["inside"] = partial(_class, inside)
        return make

    return mark


def _ours(name: str, /, **arguments: Any) -> Maker:
    @_as(name)
    def make(model: nn.Module, *, eot_iter: int | None = None, **settings: Any) -> Attack:
        made: Any = _class(name)(model, **arguments | settings)
        made.eot_iter = eot_iter
        return made

    return make


@_as("bpda.BPDAIdentity", inside="mora.MORA")
def _bpda_mora(model: nn.Module, **settings: Any) -> Attack:
    return _ours("bpda.BPDAIdentity", attack=_class("mora.MORA"))(model, **settings)


@_as("apgd.EOTAPGD")
def _eot(model: nn.Module, *, eot_iter: int | None = None, **settings: Any) -> Attack:
    return _class("apgd.EOTAPGD")(model, eot_iter=eot_iter or EOT_ITER, **settings)


def _soft(name: str, surrogate: str, /, **arguments: Any) -> Maker:
    """Return the maker of an attack on the margin of members put together softly, which the model itself judges."""

    @_as(name)
    def make(model: nn.Module, **settings: Any) -> Attack:
        from ensemble_attacks.models.surrogates import Surrogate

        return _ours(name, loss="margin", **arguments)(Surrogate(model, surrogate), **settings)

    return make


@_as("apgd.EOTAPGD")
def _expected(model: nn.Module, **settings: Any) -> Attack:
    return _eot(model, **{"loss": "log-expected"} | settings)


@_as("pgd.PGD")
def _zero_order(model: nn.Module, **settings: Any) -> Attack:
    import torch

    from ensemble_attacks.models.surrogates import ZeroOrder
    from ensemble_attacks.norms import UNIT

    width = torch.as_tensor(settings.get("box", UNIT).width).double().mean().item()
    return _ours("pgd.PGD", steps=20, n_restarts=1)(ZeroOrder(model, sigma=LOOK * width), **settings)


RECORDS: dict[str, NamedAttack] = {  # in the order in which it pays to run them
    "bpda": NamedAttack(
        "BPDAIdentity: APGD with the parts called frontend replaced by the identity in the backward pass",
        _ours("bpda.BPDAIdentity"),
        needs=(FRONTEND,),
        cost=200,
        source="Athalye et al., ICML 2018",
    ),
    "bpda-mora": NamedAttack(
        "MORA past the parts called frontend",
        _bpda_mora,
        needs=(MEMBERS, FRONTEND),
        cost=1000,
        source="Athalye et al., ICML 2018",
    ),
    "expected-apgd": NamedAttack(
        "EOTAPGD on the logarithm of the expected probability, 100 steps",
        _expected,
        cost=200,
        source="Dbouk & Shanbhag, ICML 2023",
    ),
    "mora": NamedAttack(
        "MORA: beta 0.5 (28 steps from the clean image, six times 12 at single classes), 0, 0.25, 0.75, 1 (100 each)",
        _ours("mora.MORA"),
        needs=(MEMBERS,),
        cost=1000,
        source="Yu et al., NeurIPS 2022",
    ),
    "mora-mt": NamedAttack(
        "MORA, then nine more descents towards single classes, each 100 steps",
        _ours("mora.MORA", targets=9),
        needs=(MEMBERS,),
        cost=2800,
        source="Yu et al., NeurIPS 2022",
    ),
    "lca": NamedAttack(
        "LCA, 3 restarts, 50 steps to add each member of a randomized ensemble to those that are fooled",
        _ours("lca.LCA"),
        needs=(MEMBERS, PROBABILITIES),
        source="arXiv:2307.10788",
    ),
    **{
        f"{prefix}-{name}": NamedAttack(
            f"{name.upper()} on the margin of {what}, 100 steps, judged on the vote itself",
            _soft(attack, surrogate, **options),
            needs=(MEMBERS,),
            cost=200,
            source=source,
        )
        for prefix, surrogate, what in (
            ("soft", "probability", "the members' mean probability"),
            ("votes", "votes", "soft votes, each member's at its own gap"),
        )
        for name, attack, options, source in (
            ("pgd", "pgd.PGD", {"n_restarts": 1}, "Madry et al., ICLR 2018"),
            ("apgd", "apgd.APGD", {}, CROCE),
        )
    },
    "crossmax-transfer": NamedAttack(
        "CrossMaxTransfer: APGD on the mean of the members' logits, refined on the model itself",
        _ours("crossmax_transfer.CrossMaxTransfer"),
        needs=(MEMBERS,),
        cost=400,
        source="arXiv:2411.14834",
    ),
    "eot-apgd": NamedAttack(
        "EOTAPGD: APGD of the expectation over draws, 100 steps", _eot, cost=200, source="Athalye et al., ICML 2018"
    ),
    "pgd": NamedAttack(
        "PGD on cross-entropy, 5 restarts x 100 steps of eps / 4, as the MORA paper runs it",
        _ours("pgd.PGD"),
        cost=1000,
        source="Madry et al., ICLR 2018",
    ),
    "cw": NamedAttack(
        "PGD on the margin (CW), 5 restarts x 100 steps of eps / 4",
        _ours("pgd.PGD", loss="margin"),
        cost=1000,
        source="Carlini & Wagner, S&P 2017",
    ),
    "lafeat": NamedAttack(
        "LAFEAT: through each of a network's probes, 100 steps each",
        _ours("lafeat.LAFEAT"),
        needs=(MEMBERS,),
        source="Yu et al., CVPR 2021",
    ),
    "arc": NamedAttack(
        "ARC, 20 rounds over the members of a randomized ensemble and all their boundaries",
        _ours("arc.ARC"),
        needs=(MEMBERS, PROBABILITIES),
        source="Dbouk & Shanbhag, ICML 2022",
    ),
    "a3": NamedAttack(
        "A3: 28 restarts of up to 60 steps, on ever fewer images", _ours("a3.A3"), cost=2980, source="Liu et al., CVPR 2022"
    ),
    "caa": NamedAttack(
        "the Linf policy of CAA: 9 targets x (50 + 25), then 125 steps",
        _ours("caa.CAA"),
        cost=1600,
        source="Mao et al., AAAI 2021",
    ),
    "ea-apgd-ce": NamedAttack(
        "APGD on cross-entropy in this package's loop, where fooled images stop costing passes",
        _ours("apgd.APGD"),
        cost=200,
        source=CROCE,
    ),
    "ea-apgd-dlr": NamedAttack(
        "APGD on DLR in this package's loop", _ours("apgd.APGD", loss="dlr"), fewest_classes=3, cost=200, source=CROCE
    ),
    "ea-apgd-t": NamedAttack(
        "targeted APGD on DLR in this package's loop, 9 targets x 100 steps",
        _ours("apgd.APGD", loss="dlr-targeted"),
        fewest_classes=4,
        cost=1800,
        source=CROCE,
    ),
    "pma": NamedAttack(
        "PMA: the margin of probabilities, 2 x 100 steps, of which the first half climb one of its terms",
        _ours("pma.PMA"),
        cost=400,
        source="Xie et al., CVPR 2025",
    ),
    "malt": NamedAttack(
        "MALT: targeted APGD on DLR, 9 targets x 100 steps, nearest first where the model is linear",
        _ours("malt.MALT"),
        fewest_classes=4,
        cost=1800,
        source="Melamed et al., NeurIPS 2024",
    ),
    "front-end-reversal": NamedAttack(
        "APGD on what lies behind the part called frontend, carried back through it",
        _ours("reversal.FrontEndReversal"),
        needs=(FRONTEND,),
        cost=630,
        source=BOYTSOV,
    ),
    "zero-order-pgd": NamedAttack(
        "PGD, 20 steps, on gradients estimated from 50 pairs of scores: no gradients",
        _zero_order,
        cost=2020,
        source="Spall, IEEE TAC 1992",
    ),
    **{
        name: NamedAttack(
            f"AutoAttack's {summary}",
            norms=ALL_NORMS,
            fewest_classes=classes,
            square=("L2", "L1") if name == "square" else (),
            images_only=name == "square",
            cost=cost,
            source=CROCE,
        )
        for name, summary, classes, cost in (
            ("apgd-ce", "APGD on cross-entropy, 100 steps", 2, 200),
            ("apgd-dlr", "APGD on DLR, 100 steps", 3, 200),
            ("apgd-t", "targeted APGD on DLR, 9 targets x 100 steps", 4, 1800),
            ("fab", "FAB, 100 steps", 2, 2000),
            ("fab-t", "targeted FAB, 9 targets x 100 steps", 2, 2900),
            ("square", "Square, 5000 queries, no gradients", 2, 5000),
        )
    },
    "autoattack": NamedAttack(
        "the standard AutoAttack: apgd-ce, apgd-t, fab-t, square", fewest_classes=4, cost=9900, source=CROCE
    ),
    "autoattack-rand": NamedAttack(
        "AutoAttack's version for random models: apgd-ce, apgd-dlr, 20 draws", fewest_classes=3, cost=8000, source=CROCE
    ),
    "autoattack-ensemble": NamedAttack(
        "AutoAttack(version='ensemble'): mora-mt, then the standard suite on what is left", needs=(MEMBERS,), cost=12700
    ),
    "autoattack-adaptive": NamedAttack("AutoAttack(version='adaptive'): what the model's structure asks for"),
    "auto": NamedAttack("AutoAttack(version='auto'): what a diagnosis asks for, until nothing moves"),
    "eot-square": NamedAttack(
        "AutoAttack's Square on the mean over draws, no gradients",
        square=("L2",),
        images_only=True,
        cost=5000,
        source=CROCE,
    ),
}


@cache
def registered() -> dict[str, NamedAttack]:
    """Return the attacks of this package, of AutoAttack, and of every installed package that registers some, by name.

    Raises:
        ValueError: Where two have the same name.
    """
    found, owners = dict(RECORDS), dict.fromkeys(RECORDS, "ensemble-attacks")
    for entry in entry_points(group=GROUP):
        owner = entry.dist.name if entry.dist else entry.value
        if entry.name in owners:
            raise ValueError(f"attack {entry.name!r} is registered by both {owners[entry.name]} and {owner}: uninstall one")
        owners[entry.name] = owner
        found[entry.name] = NamedAttack(f"{owner}'s", adapted(entry.name, entry.load))
    return found


def find_attack(name: str) -> NamedAttack:
    """Return the attack of a name, which may have options: ``mora?steps=10`` (`options.with_options`).

    ``minimal:NAME`` searches for the smallest radius at which another succeeds.

    Raises:
        ValueError: Where the name, or an option, is unknown; the message names the nearest one.
    """
    if name.startswith(MINIMAL):
        return _minimal(name.removeprefix(MINIMAL))
    if name.startswith(PEER):
        return peer(name)
    known, (body, query) = registered(), split_options(name)
    if body not in known:
        raise unknown_name("attack", body, known)
    if not query:
        return known[body]
    from ensemble_attacks.attacks.options import with_options

    return with_options(known[body], body, query)


def _minimal(name: str) -> NamedAttack:
    """Return the record of a search over the radius of a named attack."""
    record = find_attack(name)
    attack = record.make
    if attack is None:
        raise ValueError(
            f"attack {MINIMAL + name!r}: {name} is a pipeline, or AutoAttack's own, and has no radius to search"
        )

    def make(model: nn.Module, **settings: Any) -> Attack:
        return _class("minimal.MinimalNorm")(attack(model, **settings))

    return replace(record, summary=f"the smallest radius of each image at which {name} succeeds", make=make, cost=None)


def find_maker(name: str) -> Callable[..., Attack]:
    """Return the function that makes the attack of a name (`NamedAttack.make`).

    Raises:
        ValueError: Where the name is unknown, or the attack cannot be made by itself.
    """
    make = find_attack(name).make
    if make is None:
        own = [known for known, record in registered().items() if record.make is not None]
        raise ValueError(f"attack {name!r} is AutoAttack's own: choose from {', '.join(own)}, or {PEER}NAME")
    return make
