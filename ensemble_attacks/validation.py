"""Check what a user passes, before any work is done; each error names the argument, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor

from ensemble_attacks.errors import unknown_name
from ensemble_attacks.norms import UNIT, Box, attacked_norms, in_parts

SUMS_TO = 1e-2  # how far from 1 rounding, also in half precision, may carry the sum of probabilities


def check_dense(tensor: Tensor, name: str) -> None:
    """Raise a `TypeError` for a tensor that is sparse, nested, or holds no values."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "nested" if tensor.is_nested else "on the device 'meta'" if tensor.is_meta else tensor.layout
        raise TypeError(f"{name} must be a dense tensor that holds values, got one that is {kind}")


def check_images(images: Tensor, name: str = "images", *, slack: float = 0.0, box: Box = UNIT) -> None:
    """Check that images are floating point, (N, ...), finite and in the box (give or take ``slack``).

    Raises:
        TypeError: Where they are no tensor, or not floating point.
        ValueError: Where they have another shape or values that are not allowed.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(images).__name__}")
    check_dense(images, name)
    if not images.is_floating_point():
        raise TypeError(f"{name} has dtype {images.dtype}: convert to floating point in {box}, such as {name}.float() / 255")
    if images.dim() < 2:
        raise ValueError(
            f"{name} has shape {tuple(images.shape)}: expected at least two dimensions, (N, ...), such as (N, C, H, W)"
        )
    for bound in (box.low, box.high):
        check_per_feature("box", bound, images)
    if images.numel():
        extremes = torch.stack([torch.stack(images[part].aminmax()) for part in in_parts(images)])  # NaN where there is any
        low, high = torch.stack(extremes.aminmax()).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} holds NaN or infinite values: remove those samples first")
        if box.span is None:
            beyond = torch.stack([box.excess(images[part]).amax() for part in in_parts(images)])
        else:  # what the host knows already
            beyond = box.excess(torch.tensor([[low], [high]], dtype=images.dtype, device="cpu"))
        if beyond.amax() > slack:
            raise ValueError(
                f"{name} spans [{low:.4g}, {high:.4g}]: expected values in {box}. Divide 8-bit images by 255; for "
                "normalised inputs call set_normalization_used(mean, std) first, or normalise inside the model"
            )


def check_labels(labels: Tensor, images: Tensor, name: str = "labels") -> None:
    """Check that labels are integer class indices, (N,), one per image, and not negative.

    Raises:
        TypeError: Where they are no tensor, or not integers.
        ValueError: Where they have another shape or values that are not allowed.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    check_dense(labels, name)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {labels.dtype}: expected integer class indices, such as {name}.long()")
    if labels.dim() != 1 or len(labels) != len(images):
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}: expected ({len(images)},), one class index per image "
            "(for one-hot labels, use argmax(1))"
        )
    if len(labels) and labels.long().min() < 0:  # unsigned types have no min
        raise ValueError(f"{name} holds {labels.long().min().item()}: class indices start at 0")


def check_label_range(labels: Tensor, num_classes: int, name: str = "labels") -> None:
    """Raise a `ValueError` where labels hold a class index that the model has no score for."""
    if len(labels) and labels.long().max() >= num_classes:
        raise ValueError(
            f"{name} holds {labels.long().max().item()}, but the model scores {num_classes} classes (0 to {num_classes - 1})"
        )


def check_scores(scores: object, n: int, model: str, y: Tensor | None = None) -> None:
    """Check that a model returned for ``n`` images one floating-point tensor (N, K) of at least two classes.

    Raises:
        TypeError: Where it is no tensor, or not floating point.
        ValueError: Where it has another shape, or lacks a class that the labels ``y`` hold.
    """
    if not isinstance(scores, Tensor):
        kind = type(scores).__name__
        raise TypeError(f"model {model} returns a {kind}: wrap it so that it returns its scores alone, one tensor (N, K)")
    if scores.dim() != 2 or len(scores) != n or scores.shape[1] < 2:
        raise ValueError(
            f"model {model} returns scores of shape {tuple(scores.shape)} for {n} images: expected ({n}, K), one column for "
            "each of at least two classes"
        )
    if not scores.is_floating_point():
        raise TypeError(f"model {model} returns {scores.dtype}: expected floating-point scores")
    if y is not None:
        check_label_range(y, scores.shape[1], "y")


def check_same_classes(members: Sequence[Tensor], called: str = "members") -> None:
    """Raise a `ValueError` where members answer with different numbers of classes; names them and theirs."""
    counts = [member.shape[-1] for member in members]
    if len(set(counts)) > 1:
        theirs = ", ".join(f"{called}[{index}]: {count}" for index, count in enumerate(counts))
        raise ValueError(
            f"the {called} score different numbers of classes ({theirs}): they need the same K; map each to the ensemble's "
            "classes (ensemble_attacks.votes.Mapped)"
        )


def check_member_logits(logits: object, n: int, model: str) -> None:
    """Raise a `ValueError` unless ``member_logits`` returned one tensor (M, N, K) for ``n`` images."""
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != n or not len(logits):
        raise ValueError(
            f"member_logits of {model} returns {shape} for {n} images: expected one tensor (M, {n}, K), members first, as "
            "torch.stack makes of a list"
        )
    if not logits.is_floating_point():
        raise TypeError(f"member_logits of {model} returns {logits.dtype}: expected floating-point logits")


def check_probabilities(probabilities: Tensor, model: str) -> None:
    """Raise a `ValueError` unless the probabilities (M,) with which a model draws members are at least 0 and sum to 1."""
    check_dense(probabilities, f"probabilities of {model}")
    values = probabilities.detach().cpu().double().tolist()
    if not (values and min(values) >= 0 and abs(sum(values) - 1) <= SUMS_TO):
        raise ValueError(
            f"the probabilities of {model} are {[round(p, 6) for p in values]} and sum to {sum(values):g}: it draws members "
            "with them, so that they must be at least 0 and sum to 1"
        )


def check_one_each(probabilities: Tensor, logits_MNK: Tensor, model: str) -> None:
    """Raise a `ValueError` unless there is a probability (M,) for each of the members that answered (M, N, K)."""
    if len(probabilities) != len(logits_MNK):
        raise ValueError(
            f"the probabilities of {model} are {len(probabilities)}, but member_logits returns {len(logits_MNK)} members: "
            "give one for each"
        )


def check_norm(norm: str) -> None:
    known = attacked_norms()
    if norm not in known:
        raise unknown_name("norm", norm, known)


def check_positive(name: str, value: float) -> None:
    """Raise a `TypeError` or `ValueError` unless a value is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_per_feature(name: str, value: object, images: Tensor) -> None:
    """Raise a `ValueError` where a tensor does not broadcast over one input (...) of the images (N, ...)."""
    if isinstance(value, Tensor):
        shape = tuple(images.shape[1:])
        try:
            fits = torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected a number, or one for each feature, {shape}")


def check_eps(eps: float | Tensor) -> None:
    """Raise a `TypeError` or `ValueError` unless eps is a number above 0, or a tensor of such, 0 where nothing may move."""
    if not isinstance(eps, Tensor):
        check_positive("eps", eps)
    elif not eps.is_floating_point():
        raise TypeError(f"eps has dtype {eps.dtype}: expected floating point, one radius for each feature")
    elif not torch.isfinite(eps).all() or (eps < 0).any() or not (eps > 0).any():
        raise ValueError("eps per feature must be finite, nowhere below 0, and above 0 somewhere")


def check_mask(mask: Tensor | None, images: Tensor) -> None:
    """Raise a `TypeError` or `ValueError` unless a mask is bool, fits one input or all, and lets something move."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where the input may move, got {getattr(mask, 'dtype', mask)!r}")
    if mask.shape != images.shape:
        check_per_feature("mask", mask, images)
    if not mask.any():
        raise ValueError("mask is False everywhere: nothing may move; set True where the input may")


def check_radius(eps: float | Tensor, norm: str, image: Tensor, box: Box = UNIT) -> None:
    """Raise a `ValueError` where ``eps`` is more than any two images (...) in the box differ by."""
    check_per_feature("eps", eps, image.unsqueeze(0))
    if isinstance(eps, Tensor):
        return
    diameter = box.diameter(norm, image)
    if eps > diameter * (1 + 1e-6):
        remedy = f": did you mean eps = {eps:g}/255?" if box == UNIT else ": give it in the units of the images"
        raise ValueError(
            f"eps is {eps:g}, but images in {box} differ by at most {diameter:.4g} in {norm}, so that all would be allowed"
            + remedy
        )


def check_count(name: str, value: int, at_least: int = 1, at_most: int | None = None) -> None:
    """Raise a `TypeError` or `ValueError` unless a value is a whole number from ``at_least`` to ``at_most``, if any."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be at most {at_most:,}, got {value if value < 10**20 else 'far more'}")


def check_folder_of(name: str, path: str | Path | None) -> None:
    """Raise an `OSError` where the folder of a file that is to be written does not exist, or the file is a folder."""
    if path is not None and Path(path).is_dir():
        raise IsADirectoryError(f"{name} {str(path)!r} is a folder: name a file in it")
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{name} {str(path)!r}: there is no folder {str(Path(path).parent)!r}, make it first")


def check_seed(seed: int) -> None:
    """Raise a `TypeError` or `ValueError` unless a seed is a whole number that PyTorch's generators take."""
    check_count("seed", seed, at_least=0)
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2**63, got {seed}")


def check_fractions(name: str, values: Sequence[float]) -> None:
    """Raise a `ValueError` unless values are at least one number, all in [0, 1]."""
    if not isinstance(values, Iterable) or isinstance(values, str) or not list(values):
        raise ValueError(f"{name} must be a sequence of at least one number in [0, 1], got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value!r} in {tuple(values)!r}")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise unknown_name(name, value, known)


def check_device(device: str) -> None:
    """Raise a `ValueError` unless torch knows the device and this machine has it."""
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]}): try cpu or cuda") from None
