"""Draw the figures of a report, each with the data behind it."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ensemble_attacks.diagnostics.transfer import Member, draw_transfer, right_for_all, transfer_matrix
from ensemble_attacks.evaluation.chains import Context
from ensemble_attacks.evaluation.curves import curves_of
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.report.tables import write_csv
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.evaluation.units import Unit, by_cell, cells_of, seed_said
from ensemble_attacks.models.ask import ask, ask_members
from ensemble_attacks.models.boxed import seen_from_unit_box, share_of
from ensemble_attacks.models.surrogates import Surrogate
from ensemble_attacks.norms import UNIT
from ensemble_attacks.scores import margin

logger = logging.getLogger(__name__)
SHOWN = 8  # images of the gallery
TRANSFER_STEPS = 20
MOST_MEMBERS = 8  # of a transfer matrix
CHANNELS = (1, 3)  # of images that can be shown
MOST_FEATURES = 2000  # of inputs that are drawn as lines
GRID = 15  # points of the loss surface along each direction
DIAGNOSED = 32  # images that a diagnosis looks at


@dataclass
class Picture:
    """A figure that has a name, a caption, and the data behind it."""

    name: str
    caption: str
    figure: Figure
    columns: Sequence[str] = ()
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def png(self) -> str:
        """Return the figure as base64, for an ``img`` of the page."""
        self.figure.savefig(buffer := io.BytesIO(), format="png", dpi=110, bbox_inches="tight")
        return base64.b64encode(buffer.getvalue()).decode()

    def save(self, folder: Path) -> None:
        for kind in ("pdf", "png"):
            dated = {"CreationDate": None} if kind == "pdf" else None  # the same report has the same bytes
            self.figure.savefig(folder / f"{self.name}.{kind}", bbox_inches="tight", metadata=dated)
        if self.rows:
            write_csv(folder / f"{self.name}.csv", self.columns, self.rows)


def _title(unit: Unit) -> str:
    return unit.cell.title


def _curves(ledger: Ledger) -> list[Picture]:
    """Draw robust images against passes, all attacks of a cell on one axis (MORA, figure 4)."""
    pictures = []
    for index, (_, own) in enumerate(by_cell(ledger.manifest)):
        axes = (figure := Figure(figsize=(7, 4))).subplots()
        rows: list[tuple[Any, ...]] = []
        for units in list(zip(*own, strict=True))[1:]:
            name = units[0].attack
            there = [(unit, info) for unit in units if (info := ledger.info(unit))]
            points = _curve([info for _, info in there], sum(unit.range[1] - unit.range[0] for unit, _ in there))
            if len(points) > 1:
                passes, robust = zip(*points, strict=True)
                axes.step(passes, robust, where="post", label=name)
                rows += [(name, *point) for point in points]
        if not rows:
            continue
        axes.set(xscale="log", xlabel="passes (forward + backward) per image", ylabel="robust images (%)", ylim=(0, 101))
        axes.legend()
        caption = f"{_title(own[0][0])}: what is left robust, against the passes spent"
        pictures.append(Picture(f"convergence_{index}", caption, figure, ("attack", "passes", "robust %"), rows))
    return pictures


def _curve(infos: list[dict[str, Any]], n: int) -> list[tuple[float, float]]:
    """Return points (passes per image, robust %) of an attack over all ranges, step by step; none where it kept no trace."""
    if not infos or not all(info["trace"] for info in infos):
        return []
    moments: dict[tuple[int, int], tuple[float, float]] = {}
    for info in infos:
        for row in info["trace"]:
            spent, fooled = moments.get((row["stage"], row["step"]), (0.0, 0.0))
            moments[row["stage"], row["step"]] = spent + row["forwards"] + row["backwards"], fooled + row["fooled"]
    first = [info["trace"][0] for info in infos]
    points, spent, robust = [], 0.0, float(sum(row["robust"] + row["fooled"] for row in first))
    for _, (more, fooled) in sorted(moments.items()):
        spent, robust = spent + more, robust - fooled
        points.append((spent / n, 100 * robust / n))
    return points


def _by_eps(summary: dict[str, Any]) -> list[Picture]:
    """Draw the worst case against the radius, where a run has several."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in summary["cells"]:
        if cell["clean"] is None or "worst_case" not in cell:
            continue
        at = (cell["eps"], 100 * cell["worst_case"]["accuracy"])
        lines.setdefault(
            f"{cell['model']}, {cell['vote']}{seed_said(cell['seed'])}", [(0.0, 100 * cell["clean"]["accuracy"])]
        ).append(at)
    if all(len(points) < 3 for points in lines.values()):
        return []
    axes = (figure := Figure(figsize=(7, 4))).subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel="eps", ylabel="robust accuracy, worst case (%)", ylim=(0, 101))
    axes.legend()
    rows = [(name, *point) for name, points in lines.items() for point in sorted(points)]
    return [Picture("eps", "Robust accuracy against the radius", figure, ("model", "eps", "robust %"), rows)]


def _by_distance(ledger: Ledger) -> list[Picture]:
    """Draw robust accuracy against the radius, image by image, of searches for the smallest one, down to chance."""
    pictures = []
    for index, (cell, curves, classes) in enumerate(curves_of(ledger)):
        axes = (figure := Figure(figsize=(7, 4))).subplots()
        rows: list[tuple[Any, ...]] = []
        for curve in curves:
            points = [(radius, *(100 * share for share in shares)) for radius, *shares in curve.points()]
            radii, robust, low, high = zip(*points, strict=True)
            (line,) = axes.step(radii, robust, where="post", label=curve.attack)
            axes.fill_between(radii, low, high, step="post", alpha=0.15, color=line.get_color())
            rows += [(curve.attack, *point) for point in points]
        axes.axhline(100 / classes, linestyle=":", color="grey", label=f"chance, {classes} classes")
        axes.set(xlabel=f"radius ({cell.norm})", ylabel="robust accuracy (%)", ylim=(0, 101), xlim=(0, None))
        axes.legend()
        caption = f"{cell.title}: robust accuracy against the radius, up to {cell.eps:g}, with its 95% interval"
        columns = ("attack", "radius", "robust %", "low", "high")
        pictures.append(Picture(f"curve_{index}", caption, figure, columns, rows))
    return pictures


def _of_model(ledger: Ledger, chain: list[Unit], context: Context) -> list[Picture]:
    there = {unit: result.tensors for unit in chain[1:] if (result := ledger.read(unit)) is not None}
    if not there:  # all given up
        return []
    best = min(there, key=lambda unit: float(there[unit]["right"].sum()))
    tensors = there[best]
    index = cells_of(ledger.manifest).index(best.cell)
    pictures = [_gallery(context, tensors, best, index)]
    linf = context.settings.norm == "Linf"
    if linf:
        pictures.append(_surface(context, best, index))
    if hasattr(context.model, "member_logits"):
        pictures.append(_members(context, tensors, best, index))
        if linf and one_share(context.settings):
            pictures.append(_transfer(context, best, index))
    return [picture for picture in pictures if picture]


def _gallery(context: Context, tensors: dict[str, Tensor], unit: Unit, index: int) -> Picture | None:
    """Draw clean and adversarial images, and the perturbations magnified; nothing where no moved image fools the model."""
    moved = (tensors["x_adv"] != context.x[tensors["rows"]]).flatten(1).any(1)
    fooled = torch.nonzero(~tensors["robust"].bool() & moved).squeeze(-1)[:SHOWN]
    if not len(fooled):
        return None
    clean, images = context.x[tensors["rows"][fooled]], tensors["x_adv"][fooled]
    if clean.dim() != 4 or clean.shape[1] not in CHANNELS:
        return _lines(context, clean, images, unit, index)
    magnified = 0.5 + 0.5 * (images - clean) / _reach(context, clean)
    clean, images = (part if context.settings.box == UNIT else context.settings.box.levels(part) for part in (clean, images))
    axes = (figure := Figure(figsize=(1.1 * len(fooled), 3.4))).subplots(3, len(fooled), squeeze=False)
    for row, (name, shown) in enumerate((("clean", clean), ("adversarial", images), ("difference", magnified))):
        for column, image in enumerate(shown):
            pixels = UNIT.clamp(image).permute(1, 2, 0).numpy()
            axes[row][column].imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
            axes[row][column].set(xticks=[], yticks=[])
        axes[row][0].set_ylabel(name, fontsize=8)
    caption = f"{_title(unit)}: images of {unit.attack}; differences "
    if context.settings.plain:
        caption += f"magnified {0.5 / unit.cell.eps:.0f} times"
    else:
        caption += "as shares of eps, black and white being all of it"
    return Picture(f"gallery_{index}", caption, figure)


def _reach(context: Context, x: Tensor) -> Tensor | float:
    """Return by how much each feature of ``x`` may move, where it may."""
    eps = context.settings.eps
    return torch.where(eps > 0, eps, 1).to(x) if isinstance(eps, Tensor) else eps


def _lines(context: Context, clean: Tensor, images: Tensor, unit: Unit, index: int) -> Picture | None:
    """Draw inputs that are no images as lines over their features, and how far each feature moved, in shares of eps."""
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
        rows += [(column, *row) for row in zip(features, before, after, strict=True)]
    axes[0][0].legend(fontsize=6)
    axes[1][0].set_ylabel("moved, of eps", fontsize=8)
    figure.tight_layout()
    caption = f"{_title(unit)}: inputs of {unit.attack}, and how far each feature moved"
    return Picture(f"gallery_{index}", caption, figure, ("input", "feature", "clean", "adversarial"), rows)


@torch.no_grad()
def _members(context: Context, tensors: dict[str, Tensor], unit: Unit, index: int) -> Picture:
    """Draw how many members are wrong where the ensemble is fooled, and where it is not (MORA, figures 1c and 3a)."""
    device = next(context.model.parameters(), tensors["x_adv"]).device
    net: Any = context.model
    wrong = ask_members(net, tensors["x_adv"].to(device)).argmax(-1).cpu() != tensors["labels"]
    count, robust = wrong.sum(0), tensors["robust"].bool()
    members = range(len(wrong) + 1)
    rows = [(m, int((count[~robust] == m).sum()), int((count[robust] == m).sum())) for m in members]
    axes = (figure := Figure(figsize=(7, 3.2))).subplots()
    axes.bar([m - 0.2 for m in members], [row[1] for row in rows], 0.4, label="ensemble fooled")
    axes.bar([m + 0.2 for m in members], [row[2] for row in rows], 0.4, label="ensemble robust")
    axes.set(xlabel="members that are wrong", ylabel="images", xticks=list(members))
    axes.legend()
    caption = f"{_title(unit)}: members fooled by {unit.attack}, on {len(robust)} of the first {len(context.x)} images"
    return Picture(f"members_{index}", caption, figure, ("members wrong", "ensemble fooled", "ensemble robust"), rows)


def _transfer(context: Context, unit: Unit, index: int) -> Picture | None:
    """Draw how far adversarial examples carry from one member to another.

    Nothing is drawn where there is one member or too many, no image that all get right, or a member without a gradient.
    """
    device = next(context.model.parameters(), context.x).device
    x, y = context.x[:DIAGNOSED].to(device), context.y[:DIAGNOSED].to(device)
    net: Any = context.model
    eps = unit.cell.eps
    if not context.settings.plain:
        eps = share_of(context.settings.eps, context.settings.box, "attacks of others")
        net, x = seen_from_unit_box(context.model, x, context.settings.box)
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
        logger.warning("no transfer between the members of %s: %s", _title(unit), error)
        return None
    axes = (figure := Figure(figsize=(4, 3.4), layout="constrained")).subplots()
    draw_transfer(axes, shares)
    rows = [(i, j, share) for i, row in enumerate(shares.tolist()) for j, share in enumerate(row)]
    caption = (
        f"{_title(unit)}: of images crafted on a member (PGD-{TRANSFER_STEPS}), those that fool another (%); the {right} of "
        f"{len(x)} images that all members get right"
    )
    return Picture(f"transfer_{index}", caption, figure, ("crafted on", "fooled", "%"), rows)


def one_share(settings: Settings) -> bool:
    """Tell whether what knows [0, 1] and one eps alone can look at a model, as it is seen from there."""
    try:
        share_of(settings.eps, settings.box, "they")
    except ValueError:
        return False
    return settings.mask is None


def _surface(context: Context, unit: Unit, index: int) -> Picture:
    """Draw the margin of the first right image along its gradient's sign and random signs.

    Beside it stands the margin of the members' mean, where the model shows members.
    """
    device = next(context.model.parameters(), context.x).device
    nets: dict[str, Any] = {"the model": context.model}
    if hasattr(context.model, "member_logits"):
        nets["mean of its members' logits"] = Surrogate(context.model, "mean").eval()
    with torch.no_grad():
        right = torch.nonzero(ask(context.model, context.x.to(device)).argmax(1).cpu() == context.y).squeeze(-1)
    first = int(right[0]) if len(right) else 0
    x, y = context.x[first : first + 1].to(device), context.y[first : first + 1].to(device)
    generator = torch.Generator().manual_seed(0)
    across = (2 * torch.randint(0, 2, x.shape, generator=generator, device="cpu") - 1).to(x)
    scale = torch.linspace(-1, 1, GRID) * unit.cell.eps
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
                torch.cat([margin(ask(net, part), y.expand(len(part))) for part in points.split(64)]).cpu().view(GRID, GRID)
            )
        extent = (float(scale[0]), float(scale[-1])) * 2
        drawn = axis.imshow(heights.numpy(), origin="lower", extent=extent, aspect="auto", cmap="cividis")
        axis.set(title=name, xlabel="along the gradient's sign", ylabel="along random signs")
        figure.colorbar(drawn, ax=axis)
        rows += [(name, float(a), float(b), float(heights[i, j])) for i, b in enumerate(scale) for j, a in enumerate(scale)]
    figure.tight_layout()
    caption = f"{_title(unit)}: margin around test image {first} (fooled below 0)"
    return Picture(f"surface_{index}", caption, figure, ("model", "gradient", "random", "margin"), rows)
