"""Draw what a model does to the images of a run: a gallery, its members, how images transfer, the surface of its margin.

The last two look at the model's twin (`twin_of`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ensemble_attacks.diagnostics.transfer import Member, draw_transfer, right_for_all, transfer_matrix
from ensemble_attacks.evaluation.chains import Context
from ensemble_attacks.evaluation.report.evidence import Gathered
from ensemble_attacks.evaluation.report.picture import Picture
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.evaluation.units import CLEAN, Unit
from ensemble_attacks.models.ask import ask, ask_members, beside, device_of
from ensemble_attacks.models.boxed import seen_from_unit_box, share_of
from ensemble_attacks.models.surrogates import Surrogate
from ensemble_attacks.models.twins import SEEN, prepare
from ensemble_attacks.norms import UNIT
from ensemble_attacks.scores import margin

logger = logging.getLogger(__name__)
TRANSFER_STEPS = 20
MOST_MEMBERS = 8  # of a transfer matrix
CHANNELS = (1, 3)  # of images that can be shown
MOST_FEATURES = 2000  # of inputs that are drawn as lines


def gallery(context: Context, gathered: Gathered, unit: Unit, index: int) -> Picture | None:
    """Draw clean and adversarial images, and the perturbations magnified; nothing where no moved image fools the model."""
    clean, images, said = gathered.clean, gathered.moved, gathered.said
    if not len(clean):
        return None
    if clean.dim() != 4 or clean.shape[1] not in CHANNELS:
        return _lines(context, gathered, unit, index)
    magnified = 0.5 + 0.5 * (images - clean) / _reach(context, clean)
    clean, images = (part if context.settings.box == UNIT else context.settings.box.levels(part) for part in (clean, images))
    axes = (figure := Figure(figsize=(1.2 * len(clean), 4.1))).subplots(3, len(clean), squeeze=False)
    for row, (name, shown) in enumerate((("clean", clean), ("adversarial", images), ("difference", magnified))):
        for column, (image, evidence) in enumerate(zip(shown, gathered.shown, strict=True)):
            pixels = UNIT.clamp(image).permute(1, 2, 0).numpy()
            axes[row][column].imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
            axes[row][column].set(xticks=[], yticks=[])
            told = (f"#{evidence.number}, label {evidence.label}\nseen as {said[column]}", f"seen as {evidence.predicted}")
            axes[row][column].set_title("" if row == 2 else told[row], fontsize=7)
        axes[row][0].set_ylabel(name, fontsize=8)
    figure.tight_layout()
    caption = f"{unit.cell.title}: images of the first attack that fools the model, with their numbers; differences "
    if context.settings.plain:
        caption += f"magnified {0.5 / unit.cell.eps:.0f} times"
    else:
        caption += "as shares of eps, black and white being all of it"
    rows: list[tuple[Any, ...]] = [
        (found.number, found.label, seen, found.predicted, found.attack)
        for found, seen in zip(gathered.shown, said, strict=True)
    ]
    return Picture(f"gallery_{index}", caption, figure, ("image", "label", "clean", "adversarial", "attack"), rows)


def _reach(context: Context, x: Tensor) -> Tensor | float:
    """Return by how much each feature of ``x`` may move, where it may."""
    eps = context.settings.eps
    return torch.where(eps > 0, eps, 1).to(x) if isinstance(eps, Tensor) else eps


def _lines(context: Context, gathered: Gathered, unit: Unit, index: int) -> Picture | None:
    """Draw inputs that are no images as lines over their features, and how far each feature moved, in shares of eps."""
    clean, images = gathered.clean, gathered.moved
    if clean[0].numel() > MOST_FEATURES:
        return None
    moved = (images - clean) / _reach(context, clean)
    axes = (figure := Figure(figsize=(2.2 * len(clean), 3.4))).subplots(2, len(clean), squeeze=False)
    features = range(clean[0].numel())
    rows: list[tuple[Any, ...]] = []
    for column, parts in enumerate(zip(clean, images, moved, strict=True)):
        before, after, share = (part.flatten().tolist() for part in parts)
        axes[0][column].step(features, before, where="mid", label="clean")
        axes[0][column].step(features, after, where="mid", label="adversarial")
        axes[1][column].bar(features, share)
        axes[1][column].set(ylim=(-1.05, 1.05), xlabel="feature")
        evidence = gathered.shown[column]
        axes[0][column].set_title(
            f"#{evidence.number}, label {evidence.label}\nseen as {gathered.said[column]}, then {evidence.predicted}",
            fontsize=7,
        )
        rows += [(evidence.number, *row) for row in zip(features, before, after, strict=True)]
    axes[0][0].legend(fontsize=6)
    axes[1][0].set_ylabel("moved, of eps", fontsize=8)
    figure.tight_layout()
    caption = f"{unit.cell.title}: inputs of the first attack that fools the model, and how far each feature moved"
    return Picture(f"gallery_{index}", caption, figure, ("input", "feature", "clean", "adversarial"), rows)


def members(gathered: Gathered, unit: Unit, index: int) -> Picture:
    """Draw how many members are wrong where the ensemble is fooled, and where it is not (MORA, figures 1c and 3a)."""
    attacked = [evidence for evidence in gathered.images if CLEAN not in evidence.fooled_by and evidence.wrong is not None]
    counts = range(gathered.members + 1)
    fooled, robust = ([0] * len(counts), [0] * len(counts))
    for evidence in attacked:
        assert evidence.wrong is not None
        (fooled if evidence.fooled_by else robust)[len(evidence.wrong)] += 1
    rows: list[tuple[Any, ...]] = list(zip(counts, fooled, robust, strict=True))
    axes = (figure := Figure(figsize=(7, 3.2))).subplots()
    axes.bar([m - 0.2 for m in counts], fooled, 0.4, label="ensemble fooled")
    axes.bar([m + 0.2 for m in counts], robust, 0.4, label="ensemble robust")
    axes.set(xlabel="members that are wrong", ylabel="images", xticks=list(counts))
    axes.legend(fontsize=8)
    names = sorted({evidence.attack for evidence in attacked} - {CLEAN})
    whose = names[0] if len(names) == 1 else "the attack that fools each image first, or comes nearest to it"
    caption = f"{unit.cell.title}: members fooled by {whose}, on {len(attacked)} images that are right without an attack"
    return Picture(f"members_{index}", caption, figure, ("members wrong", "ensemble fooled", "ensemble robust"), rows)


def transfer(context: Context, net: Any, unit: Unit, index: int, n: int) -> Picture | None:
    """Draw how far adversarial examples of the first ``n`` images carry from one member of ``net`` to another.

    Nothing is drawn where there is one member or too many, no image that all get right, or a member without a gradient.
    """
    device = device_of(context.model, context.x.device)
    x, y = context.x[:n].to(device), context.y[:n].to(device)
    eps = unit.cell.eps
    if not context.settings.plain:
        eps = share_of(context.settings.eps, context.settings.box, "attacks of others")
        net, x = seen_from_unit_box(net, x, context.settings.box)
    with torch.no_grad():
        count = len(ask_members(net, x[:1]))
    if not 1 < count <= MOST_MEMBERS:
        return None
    members = [Member(net, m) for m in range(count)]
    right = int(right_for_all(members, x, y).sum())
    if not right:
        return None
    try:
        shares = transfer_matrix(members, x, y, eps=eps, steps=TRANSFER_STEPS)
    except RuntimeError as error:  # autograd's, of a member without a gradient
        logger.warning("no transfer between the members of %s: %s", unit.cell.title, error)
        return None
    axes = (figure := Figure(figsize=(4, 3.4), layout="constrained")).subplots()
    draw_transfer(axes, shares)
    rows = [(i, j, share) for i, row in enumerate(shares.tolist()) for j, share in enumerate(row)]
    caption = (
        f"{unit.cell.title}: of images crafted on a member (PGD-{TRANSFER_STEPS}), those that fool another (%); the {right} "
        f"of the first {len(x)} images that all members get right"
    )
    return Picture(f"transfer_{index}", caption, figure, ("crafted on", "fooled", "%"), rows)


def one_share(settings: Settings) -> bool:
    """Tell whether what knows [0, 1] and one eps alone can look at a model, as it is seen from there."""
    try:
        share_of(settings.eps, settings.box, "they")
    except ValueError:
        return False
    return settings.mask is None


def twin_of(context: Context) -> nn.Module:
    """Return what `transfer` and `surface` look at: a twin that computes what the model does, for less."""
    return prepare(context.model, beside(context.model, context.x[:SEEN]))


@torch.no_grad()
def _first_right(context: Context) -> int:
    """Return the place of the first image that the model classifies rightly; 0 where it does none."""
    parts = zip(context.x.split(SEEN), context.y.split(SEEN), strict=True)
    for number, (x, y) in enumerate(parts):
        right = ask(context.model, beside(context.model, x)).argmax(1).cpu() == y
        if right.any():
            return number * SEEN + int(right.int().argmax())
    return 0


def surface(context: Context, net: Any, unit: Unit, index: int, grid: int) -> Picture:
    """Draw the margin of ``net`` around the first right image, along its gradient's sign and random signs.

    There are ``grid`` points along each. Beside it stands the margin of the members' mean, where the model shows members.
    """
    device = device_of(context.model, context.x.device)
    nets: dict[str, Any] = {"the model": net}
    if hasattr(net, "member_logits"):
        nets["mean of its members' logits"] = Surrogate(net, "mean").eval()
    first = _first_right(context)
    x, y = context.x[first : first + 1].to(device), context.y[first : first + 1].to(device)
    generator = torch.Generator().manual_seed(0)
    across = (2 * torch.randint(0, 2, x.shape, generator=generator, device="cpu") - 1).to(x)
    scale = torch.linspace(-1, 1, grid) * unit.cell.eps
    box, mask, eps = context.settings.box, context.settings.mask, context.settings.eps
    units: Any = eps.to(x) / unit.cell.eps if isinstance(eps, Tensor) else 1.0
    units = units if mask is None else units * mask.to(device)
    axes = (figure := Figure(figsize=(4.2 * len(nets), 3.4))).subplots(1, len(nets), squeeze=False)
    rows: list[tuple[Any, ...]] = []
    for axis, (name, net) in zip(axes[0], nets.items(), strict=True):
        image = x.clone().requires_grad_()
        value = margin(ask(net, image), y)
        (slope,) = torch.autograd.grad(value.sum(), image, allow_unused=True) if value.requires_grad else (None,)
        gradient = torch.zeros_like(x) if slope is None else slope
        along, beside = (units * direction for direction in (gradient.sign(), across))
        points = box.clamp(torch.cat([x + a * along + b * beside for b in scale for a in scale]))
        with torch.no_grad():
            heights = (
                torch.cat([margin(ask(net, part), y.expand(len(part))) for part in points.split(64)]).cpu().view(grid, grid)
            )
        extent = (float(scale[0]), float(scale[-1])) * 2
        drawn = axis.imshow(heights.numpy(), origin="lower", extent=extent, aspect="auto", cmap="cividis")
        axis.set(title=name, xlabel="along the gradient's sign", ylabel="along random signs")
        figure.colorbar(drawn, ax=axis)
        rows += [(name, float(a), float(b), float(heights[i, j])) for i, b in enumerate(scale) for j, a in enumerate(scale)]
    figure.tight_layout()
    caption = f"{unit.cell.title}: margin around test image {first} (fooled below 0)"
    return Picture(f"surface_{index}", caption, figure, ("model", "gradient", "random", "margin"), rows)
