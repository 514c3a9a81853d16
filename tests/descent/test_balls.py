"""Projected images are inside ball and box to the last bit."""

from __future__ import annotations

import pytest
import torch

from ensemble_attacks.descent.balls import l2_norm, make_ball
from ensemble_attacks.descent.noise import sample_keys, start_noise

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("eps", [8 / 255, 0.01, 0.3])
def test_projection_is_exact_in_float64(dtype: torch.dtype, norm: str, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(50, 3, 8, 8, generator=generator).to(dtype)
    clean[:10] = clean[:10].round()  # corners of the box
    if (norm, dtype) == ("L2", torch.bfloat16) and eps < 0.05:  # rounding alone is larger
        with pytest.raises(ValueError, match="use float32"):
            make_ball(norm, clean, eps)
        return
    far = clean + torch.randn(50, 3, 8, 8, generator=generator).to(dtype)
    projected = make_ball(norm, clean, eps).project(far)
    assert projected.dtype == dtype
    assert ((projected >= 0) & (projected <= 1)).all()
    delta = (projected.double() - clean.double()).flatten(1)
    size = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    assert (size <= eps).all()


def test_projection_reaches_the_boundary() -> None:
    clean = torch.full((4, 3, 8, 8), 0.5)
    assert (make_ball("Linf", clean, 0.1).project(clean + 1) - clean).abs().min() > 0.1 - 1e-6
    assert (make_ball("L2", clean, 0.1).project(clean + 1) - clean).flatten(1).norm(dim=1).min() > 0.1 - 1e-5


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_points_inside_stay(norm: str) -> None:
    clean = torch.rand(4, 3, 8, 8)
    ball = make_ball(norm, clean, 0.5)
    inside = (clean + 0.001).clamp(0, 1)
    torch.testing.assert_close(ball.project(inside), inside, rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_steepest_of_a_zero_gradient_is_zero(norm: str) -> None:
    clean = torch.rand(2, 3, 4, 4)
    assert torch.equal(make_ball(norm, clean, 0.1).steepest(torch.zeros_like(clean)), torch.zeros_like(clean))


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e30])
def test_steepest_has_unit_norm_however_small_the_gradient(size: float) -> None:
    clean = torch.rand(2, 3, 4, 4)
    direction = make_ball("L2", clean, 0.1).steepest(torch.full_like(clean, size))
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_noise_belongs_to_the_sample(norm: str) -> None:
    images = torch.rand(6, 3, 4, 4)
    draw = lambda x, **kw: start_noise(sample_keys(x), x, **{"seed": 0, "restart": 0, "norm": norm, **kw})  # noqa: E731
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert torch.equal(draw(images)[order], draw(images[order]))
    assert torch.equal(draw(images)[2:3], draw(images[2:3]))
    assert torch.equal(draw(images.double()).float(), draw(images))
    assert not torch.equal(draw(images), draw(images, seed=1))
    assert not torch.equal(draw(images), draw(images, restart=1))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 32), (torch.float16, 128), (torch.bfloat16, 32)])
def test_half_precision_has_nearly_the_whole_ball(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, far = (torch.rand(4, 3, size, size, generator=generator).to(dtype) for _ in range(2))
    reached = l2_norm(make_ball("L2", clean, 0.5).project(far).double() - clean.double())
    assert (reached <= 0.5).all()
    assert (reached > 0.49).all()
