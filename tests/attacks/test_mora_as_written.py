"""`MORA.published` and `MORA.released` against transcriptions, sample by sample, of the paper and of what its code does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import MORA, Ensemble
from ensemble_attacks.attacks.mora_as_written import published, released
from ensemble_attacks.descent.noise import sample_keys, start_noise
from ensemble_attacks.descent.objectives import Goal
from ensemble_attacks.models.votes import VOTES as KNOWN
from ensemble_attacks.scores import margin
from tests.helpers import VOTES, make_ensemble

Loss = Callable[[Tensor, int, float, str, int | None], Tensor]  # (logits (M, K), label, beta, vote, target)
EPS = 0.03


def cross_entropy(v: Tensor, y: int) -> Tensor:
    return -(v[y] - v.max().detach() - (v - v.max().detach()).exp().sum().log())


def runner_up(v: Tensor, y: int) -> int:
    return max((j for j in range(len(v)) if j != y), key=lambda j: v[j].item())


def softmax(v: Tensor) -> Tensor:
    e = (v - v.max().detach()).exp()
    return e / e.sum()


def top_gap(v: Tensor) -> float:
    first, second = sorted(v.tolist(), reverse=True)[:2]
    return first - second


def by_the_paper(z: Tensor, y: int, beta: float, vote: str, target: int | None) -> Tensor:
    """Equations 7-12 of the paper, for one sample."""
    tau = 0.1 if vote == "voting" else 1.0
    probabilities = [softmax(member / tau) for member in z]
    ensemble = sum(z) / len(z) if vote == "logits" else sum(probabilities) / len(z)
    assert isinstance(ensemble, Tensor)
    hat = runner_up(ensemble, y) if target is None else target

    def lead(v: Tensor) -> float:
        return (v[y] - v[runner_up(v, y) if target is None else target]).item()

    members = torch.zeros_like(ensemble)
    for member, p in zip(z, probabilities, strict=True):
        s_y, s_hat = p[y].item(), p[hat].item()
        weight = 1 / len(z) if vote == "logits" else s_y * (1 + s_y - s_hat) / (tau * len(z))
        members = members + (weight if lead(member) > 0 else 0.0) * member

    def norm(v: Tensor) -> Tensor:
        return v / lead(v) if lead(v) > 0 else 0 * v

    mixture = (1 - beta) * norm(ensemble) + beta * norm(members)
    return cross_entropy(mixture, y) if target is None else -cross_entropy(mixture, target)


def by_the_code(z: Tensor, y: int, beta: float, vote: str, target: int | None) -> Tensor:
    """What the released code maximises, for one sample."""

    def log_mean(parts: list[Tensor]) -> Tensor:
        return torch.stack([softmax(part) for part in parts]).mean(0).log()

    if vote == "voting":
        scale, predicted = log_mean([v / top_gap(v) for v in z]), log_mean([10 * v / top_gap(v) for v in z])
    else:
        scale = z.mean(0) if vote == "logits" else log_mean(list(z))
        predicted = scale
    if target is not None:
        return -cross_entropy(predicted, target)
    outputs = [*z, scale]
    c = max(1.0, max(top_gap(out) / 10 for out in outputs))
    q = sum(softmax(member / c) for member in z) / len(outputs)
    assert isinstance(q, Tensor)
    hat, top = runner_up(q, y), int(q.argmax())
    total, weights = torch.zeros_like(scale), 1e-8
    for out in outputs:
        s = softmax({"softmax": 0.2, "voting": 0.8, "logits": 0.0}[vote] * out)
        sign = -1 if top == y else 1  # both are stored with a minus where y is ahead
        s_hat, q_hat = sign * s[hat].item(), sign * q[hat].item()
        weight = s_hat * (s[y].item() / q[y].item() + (1 - s_hat) / q_hat)
        if vote != "logits" and int(out.argmax()) != y:
            weight = 0.0
        total, weights = total + weight * out / c, weights + weight
    return cross_entropy((1 - beta) * scale / top_gap(scale) + beta * total / weights, y)


READINGS: dict[str, tuple[Loss, Callable[..., Tensor], Callable[..., MORA]]] = {
    "published": (by_the_paper, published, MORA.published),
    "released": (by_the_code, released, MORA.released),
}


@pytest.mark.parametrize("aimed", [False, True])
@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("reading", READINGS)
def test_loss_and_gradient_are_those_that_are_written(reading: str, vote: str, beta: float, aimed: bool) -> None:
    written, ours, _ = READINGS[reading]
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 24, 5, dtype=torch.float64, generator=generator)
    logits[:, 16:] *= 4  # gaps beyond ten
    if reading == "published" and vote == "voting":
        logits /= 10  # at a temperature of 0.1, two sure members differ by rounding alone, and eq. 12 divides by that
    labels = KNOWN[vote].aggregate(logits).argmax(1)
    labels[12:16] = (labels[12:16] + 1) % 5  # and some that are wrong already
    targets = (labels + 2) % 5
    leaf = logits.clone().requires_grad_()
    goal = Goal(labels, targets if aimed else None)
    loss = ours(leaf, KNOWN[vote].aggregate(leaf), goal, beta=beta, vote=KNOWN[vote])
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    plain = logits.clone().requires_grad_()
    aims = targets.tolist() if aimed else [None] * 24
    expected = torch.stack(
        [written(plain[:, n], int(labels[n]), beta, vote, aim) for n, aim in enumerate(aims)]  # type: ignore[arg-type]
    )
    (by_hand,) = torch.autograd.grad(expected.sum(), plain)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-7, atol=1e-9)


def attacked(
    model: Ensemble, x: Tensor, y: int, noise: list[Tensor], plan: list[tuple[float, int | None]], steps: int, reading: str
) -> Tensor | None:
    """Algorithm 1 on one image: the first success, or none."""
    vote, loss = str(model.vote), READINGS[reading][0]
    low, high = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
    for t, (beta, target) in zip(noise, plan, strict=True):
        point = (x + EPS * (t / t.abs().max() if reading == "released" else t)).clamp(0, 1)
        previous = point
        for i in range(steps + 1):
            if margin(model(point), torch.tensor([y])).item() < 0:
                return point
            if i == steps:
                break
            leaf = point.clone().requires_grad_()
            value = loss(model.member_logits(leaf)[:, 0], y, beta, vote, target)
            (gradient,) = torch.autograd.grad(value, leaf)
            length = EPS * (1 + math.cos(math.pi * i / steps))
            ahead = (point + length * gradient.sign()).clamp(low, high)
            share = 1.0 if i == 0 and not (reading == "released" and target is not None) else 0.75
            following = point + share * (ahead - point) + (1 - share) * (point - previous)
            previous, point = point, following.clamp(low, high)
    return None


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("reading", READINGS)
def test_the_attack_is_the_one_that_is_written(reading: str, vote: str, batch: tuple[Tensor, Tensor]) -> None:
    model, images = make_ensemble(vote), batch[0][:16]
    labels = model(images).argmax(1)
    betas, steps = (0.5, 1.0), 5
    found = READINGS[reading][2](model, eps=EPS, steps=steps, betas=betas, targets=1)(images, labels)
    likeliest = model(images).scatter(1, labels.unsqueeze(1), -torch.inf).argmax(1)
    fooled = 0
    for n, key in enumerate(sample_keys(images)):
        x, plan = images[n : n + 1], [*((beta, None) for beta in betas), (0.5, int(likeliest[n]))]
        noise = [start_noise([key], x, seed=0, restart=restart, norm="Linf") for restart in range(3)]
        expected = attacked(model, x, int(labels[n]), noise, plan, steps, reading)
        assert (margin(model(found[n : n + 1]), labels[n : n + 1]).item() < 0) == (expected is not None)
        if expected is not None:
            fooled += 1
            torch.testing.assert_close(found[n : n + 1], expected, rtol=0, atol=1e-12)
    assert 2 <= fooled < 16


def test_what_is_written_of_three_votes_is_refused_of_others() -> None:
    members = list(make_ensemble().members)
    with pytest.raises(ValueError, match=r"MORA\.published knows the votes softmax, voting, logits without weights"):
        MORA.published(Ensemble(members, "softmax", weights=[1, 2, 3]))
    with pytest.raises(ValueError, match=r"MORA\.released knows the votes"):
        MORA.released(RandomizedEnsemble(members, seed=0))
    with pytest.raises(ValueError, match=r"weight_rule is settled in MORA\.released"):
        MORA.released(make_ensemble(), weight_rule="code")
