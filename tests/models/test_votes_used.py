"""Votes as people use them: exact values from their definitions, and attacks that find in them what there is to find."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from defenses import load_model
from ensemble_attacks import APGD, EOTAPGD, MORA, CrossMaxTransfer, Ensemble, as_ensemble, judge
from ensemble_attacks.data import load_dataset
from ensemble_attacks.models.mapped import Mapped, ecoc, one_vs_rest, over
from ensemble_attacks.models.pooled import abstaining, stacked, trimmed
from ensemble_attacks.models.routed import cascade, gated
from ensemble_attacks.models.sampled import augmented, mc_dropout, smoothed
from ensemble_attacks.models.votes import Vote, check_vote, vote_of, weighted
from tests.helpers import make_member

M, N, K = 5, 40, 6
WEIGHTS = [0.4, 0.2, 0.2, 0.15, 0.05]
CODE = [[1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 1, 1, 1]]


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return 2 * torch.randn(M, N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_hand(logits_MNK: Tensor, rule: Callable[[list[list[float]]], list[float]]) -> Tensor:
    """Return what a rule in plain numbers, of one sample's logits by member, makes of all samples."""
    return torch.tensor([rule(z) for z in logits_MNK.transpose(0, 1).tolist()], dtype=logits_MNK.dtype)


def softmax(z: list[float]) -> list[float]:
    total = sum(map(math.exp, z))
    return [math.exp(one) / total for one in z]


def columns(z: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*z, strict=True)]


def sure(z: list[float]) -> float:
    return max(softmax(z))


def first_sure(z: list[list[float]], threshold: float) -> list[float]:
    return next((one for one in z if sure(one) >= threshold), z[-1])


def votes(z: list[list[float]], weights: list[float]) -> list[float]:
    return [sum(w for w, one in zip(weights, z, strict=True) if one.index(max(one)) == k) for k in range(len(z[0]))]


def logs(values: list[float]) -> list[float]:
    return [math.log(value) if value else -math.inf for value in values]


EQUALLY = [1 / M] * M
RULES: dict[str, tuple[str | Vote, Callable[[list[list[float]]], list[float]]]] = {
    "softmax": (
        weighted("softmax", WEIGHTS),
        lambda z: logs([sum(w * p for w, p in zip(WEIGHTS, ps, strict=True)) for ps in columns([softmax(o) for o in z])]),
    ),
    "logits": (
        weighted("logits", [10 * w for w in WEIGHTS]),
        lambda z: [sum(w * one for w, one in zip(WEIGHTS, zs, strict=True)) for zs in columns(z)],
    ),
    "median": ("median", lambda z: [sorted(zs)[M // 2] for zs in columns(z)]),
    "trimmed": (trimmed(1), lambda z: [sum(sorted(zs)[1:-1]) / (M - 2) for zs in columns(z)]),
    "max": ("max", lambda z: logs([max(ps) for ps in columns([softmax(one) for one in z])])),
    "product": ("product", lambda z: logs([math.prod(ps) for ps in columns([softmax(one) for one in z])])),
    "borda": (
        "borda",
        lambda z: [sum(sum(one[k] > other for other in one) for one in z) / M / (K - 1) for k in range(K)],
    ),
    "decided": ("decided", lambda z: logs(softmax(max(z, key=sure)))),
    "cascade": (cascade(0.7), lambda z: logs(softmax(first_sure(z, 0.7)))),
    "over": (
        over([0, 0, 1, 1, 2, 2], "softmax"),
        lambda z: logs([sum(softmax(one)[2 * k] + softmax(one)[2 * k + 1] for one in z) / M for k in range(3)]),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_values_are_those_of_the_definition(name: str, logits: Tensor) -> None:
    vote, rule = RULES[name]
    torch.testing.assert_close(check_vote(vote).aggregate(logits), by_hand(logits, rule))


@pytest.mark.parametrize("name", RULES)
def test_values_are_the_same_where_a_gradient_is_wanted(name: str, logits: Tensor) -> None:
    model = Ensemble([nn.Identity()] * M, RULES[name][0])
    images = logits.clone().requires_grad_()
    scores = model.aggregate(images)
    torch.testing.assert_close(scores.detach(), model.aggregate(logits), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(scores[:, 0].sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_weighted_votes_are_counted_by_weight(logits: Tensor) -> None:
    """But for a millionth, by which the expected probability breaks ties."""
    for vote, weights in ((weighted("voting", WEIGHTS), WEIGHTS), (abstaining(0.5), EQUALLY)):
        shares = vote.aggregate(logits).exp()[:, :K]
        torch.testing.assert_close(shares, by_hand(logits, partial(votes, weights=weights)), rtol=0, atol=2e-6)


def test_abstention_is_a_class_more(logits: Tensor) -> None:
    expected = by_hand(logits, lambda z: [float(max(votes(z, EQUALLY)) < 0.6 - 1e-9)])[:, 0].bool()
    assert torch.equal(abstaining(0.6).aggregate(logits).argmax(1) == K, expected)
    assert 0 < expected.sum() < N
    even = torch.eye(K, dtype=torch.float64)[:2].unsqueeze(1)
    assert abstaining(0.5).aggregate(even).argmax(1) == 0  # a share of just the threshold answers
    assert abstaining(0.51).aggregate(even).argmax(1) == K


def test_gates_weigh_members_by_the_image(logits: Tensor) -> None:
    gate = nn.Linear(3, M).double()
    x = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = gate(x).softmax(1)
    p = logits.softmax(-1)
    for top, chosen in ((None, g), (1, g * (g == g.amax(1, keepdim=True))), (2, g * (g >= g.topk(2).values[:, -1:]))):
        vote = gated(gate, top)
        assert vote.joined is not None
        scores = vote.aggregate(vote.joined(x, logits))
        chosen = chosen / chosen.sum(1, keepdim=True)
        torch.testing.assert_close(scores.exp(), torch.einsum("nm,mnk->nk", chosen, p))


def test_codes_are_decoded() -> None:
    logits = torch.randn(5, N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bits = logits[..., 1] - logits[..., 0]
    sign = 2 * torch.tensor(CODE).double() - 1
    soft = torch.einsum("kmn->nk", (sign.unsqueeze(-1) * bits).sigmoid().log())
    torch.testing.assert_close(ecoc(CODE).aggregate(logits), soft)
    hard = torch.stack([((sign[k] > 0) == (bits > 0).T).double().mean(1) for k in range(4)], 1)
    torch.testing.assert_close(ecoc(CODE, hard=True).aggregate(logits), hard)
    assert torch.equal(one_vs_rest().aggregate(logits), bits.T)


def test_a_member_over_some_classes() -> None:
    net = make_member(3).double()
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    p = Mapped(net, [3, 1, 3], 4)(x).exp()
    z = net(x).softmax(1)
    torch.testing.assert_close(p, torch.stack([0 * z[:, 0], z[:, 1], 0 * z[:, 0], z[:, 0] + z[:, 2]], 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighted("voting", [1, -1]), "at least 0"),
        (lambda: weighted("votng", [1, 1]), "did you mean 'voting'"),
        (lambda: Ensemble([nn.Identity()] * 3, "voting", weights=[1, 1]), "made for 2 members, there are 3"),
        (lambda: Ensemble([nn.Identity()] * 3, "medain"), "did you mean 'median'"),
        (lambda: Ensemble([nn.Identity()] * 3, trimmed(2)).aggregate(torch.zeros(3, 1, 2)), "cut=2 leaves none of 3"),
        (lambda: abstaining(1.5), "threshold"),
        (lambda: cascade(0), "threshold"),
        (lambda: ecoc([[2, 0]]), "code must be"),
        (lambda: Ensemble([nn.Identity()] * 3, ecoc(CODE)), "made for 5 members"),
        (lambda: over([0, 3], count=2), "one of 2 classes"),
        (lambda: mc_dropout(nn.Linear(2, 2), 3), "no dropout"),
    ],
)
def test_what_cannot_vote_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Bit(nn.Module):
    """A network that answers whether an image is of one of some classes, no and yes."""

    def __init__(self, net: nn.Module, yes: Tensor) -> None:
        super().__init__()
        self.net, self.yes = net, yes

    def forward(self, x: Tensor) -> Tensor:
        log_p = self.net(x).log_softmax(-1)
        return torch.stack([log_p[:, ~self.yes].logsumexp(1), log_p[:, self.yes].logsumexp(1)], 1)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(64, M)
        with torch.no_grad():
            self.score.weight.normal_(generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x.flatten(1) - 0.3)


def stacker() -> nn.Module:
    layer = nn.Linear(10 * M, 10, bias=False)
    layer.weight.data = torch.cat([weight * torch.eye(10) for weight in WEIGHTS], 1)
    return layer


@pytest.fixture(scope="module")
def nets() -> list[nn.Module]:
    found = [load_model(name, dataset="digits").members for name in ("gal_convnet_3", "standard_convnet_3")]
    return [net for members in found for net in members][:M]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return load_dataset("digits", n=6)


CODE_10 = torch.randint(0, 2, (10, 9), generator=torch.Generator().manual_seed(0))
MODELS: dict[str, Callable[[list[nn.Module]], nn.Module]] = {
    **{f"weighted {v}": partial(Ensemble, vote=weighted(v, WEIGHTS)) for v in ("softmax", "voting", "logits")},
    **{vote: partial(Ensemble, vote=vote) for vote in ("median", "max", "product", "borda", "decided")},
    "trimmed": partial(Ensemble, vote=trimmed(1)),
    "abstaining": partial(Ensemble, vote=abstaining(0.6, WEIGHTS)),
    "stacked": lambda nets: Ensemble(nets, stacked(stacker())),
    "gated": lambda nets: Ensemble(nets, gated(Gate())),
    "top-1": lambda nets: Ensemble(nets, gated(Gate(), top=1)),
    "cascade": partial(Ensemble, vote=cascade(0.8)),
    "ecoc": lambda nets: Ensemble([Bit(nets[m % M], CODE_10[:, m] > 0) for m in range(9)], ecoc(CODE_10.tolist())),
    "ecoc hard": lambda nets: Ensemble(
        [Bit(nets[m % M], CODE_10[:, m] > 0) for m in range(9)], ecoc(CODE_10.tolist(), hard=True)
    ),
    "one-vs-rest": lambda nets: Ensemble([Bit(nets[k % M], torch.arange(10) == k) for k in range(10)], one_vs_rest()),
    "over": partial(Ensemble, vote=over([0, 1, 2, 3, 4, 5, 6, 7, 8, 8], "voting", count=10)),
    "augmented": lambda nets: augmented(nets[0], [nn.Identity(), partial(torch.roll, shifts=1, dims=-1)]),
}


FAST = ("weighted voting", "median", "borda", "abstaining", "top-1", "cascade", "ecoc hard", "over")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in MODELS])
def test_mora_leaves_no_more_than_the_models_own_scores(
    name: str, nets: list[nn.Module], digits: tuple[Tensor, Tensor]
) -> None:
    x, y = digits
    model = MODELS[name](nets).eval()
    attacks = MORA(model, eps=0.12, steps=8), APGD(model, eps=0.12, steps=16)
    mora, own = (int(judge(model, x, y, attack(x, y), eps=0.12).robust.sum()) for attack in attacks)
    assert mora <= own + 1
    transfer = CrossMaxTransfer(model, attack=APGD, refine=None, eps=0.12, steps=3)(x, y)
    assert judge(model, x, y, transfer, eps=0.12).robust.sum() < len(x)


class Mixture(nn.Module):
    """Somebody else's mixture of experts."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets, self.gate = nn.ModuleList(nets), Gate()

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nm,mnk->nk", self.gate(x).softmax(1), torch.stack([net(x).softmax(1) for net in self.nets]))


def test_a_mixture_of_experts_is_adopted(nets: list[nn.Module], digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    theirs = Mixture(nets).eval()
    adopted = as_ensemble(theirs, "nets", gated(theirs.gate), inputs=x)
    assert vote_of(adopted).name == "gated"
    assert judge(theirs, x, y, MORA(adopted, eps=0.15, steps=10)(x, y), eps=0.15).robust.sum() <= len(x) // 2


@pytest.mark.parametrize("make", [partial(smoothed, sigma=0.1, draws=4), partial(mc_dropout, draws=4)])
def test_draws_of_one_network_are_attacked(make: Callable[..., Ensemble]) -> None:
    x = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = make(make_member().eval()).eval()
    assert not torch.equal(model.member_logits(x)[0], model.member_logits(x)[1])
    y = make_member()(x).argmax(1)
    mora, own = (
        judge(model, x, y, attack(x, y), eps=0.15, draws=10).accuracy
        for attack in (MORA(model, eps=0.15, steps=10, eot_iter=4), EOTAPGD(model, eps=0.15, steps=20, eot_iter=4))
    )
    assert mora <= own + 2 / len(x)
