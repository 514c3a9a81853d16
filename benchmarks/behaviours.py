"""What real models, callers and data do, as small models whose right answers are known: the columns of `matrix`.

Each behaviour is a function that makes a `Case`. Members are linear, so that thousands of cells take minutes; every pass of
one is counted.
"""

from __future__ import annotations

import functools
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.crossmax import CrossMax
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import Ensemble, as_ensemble

N, CLASSES, SHAPE = 8, 5, (3, 8, 8)
EPS = {"Linf": 0.03, "L2": 0.3, "L1": 2.0}
NAMES = ("nets.0", "nets.1", "nets.2")
PASSES = [0]  # of all members so far


@dataclass
class Case:
    """A model as a user may bring it.

    Attributes:
        model: what is handed to the package.
        twin: a well-behaved model with the same scores; where it can be attacked, so must the model be. ``None``: it must be
            refused, by one typed error, before any work.
        x, y: images and labels.
        norm: the norm.
        random: whether its scores are drawn.
        within: the context of the caller.
        breaks: whether the model itself may raise, which its caller must see, or a flag.
        modules: what must be left as it was; ``None``: the model.
        rival: a model that is attacked at full strength, and has the twin's scores but for ties; ``None``: the twin.
    """

    model: Any
    twin: nn.Module | None
    x: Tensor
    y: Tensor
    norm: str = "Linf"
    random: bool = False
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    breaks: bool = False
    modules: list[nn.Module] = field(default_factory=list)
    rival: nn.Module | None = None

    def __post_init__(self) -> None:
        self.modules = self.modules or [self.model]


class Front(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.9 * x + 0.05


class Head(nn.Module):
    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        PASSES[0] += 1
        return self.linear(x.flatten(1))


def member(seed: int = 0, classes: int = CLASSES, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(OrderedDict(frontend=Front(), head=Head(classes, torch.Size(shape).numel()))).eval()


def members(count: int = 3, classes: int = CLASSES, shape: tuple[int, ...] = SHAPE) -> list[nn.Module]:
    return [member(seed, classes, shape) for seed in range(count)]


class Wrapped(nn.Module):
    """A model with something before and after it."""

    def __init__(
        self,
        net: nn.Module,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before or (lambda x: x), after or (lambda scores: scores)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.after(self.net(self.before(x)))


class Answering(Ensemble):
    """An ensemble that hands its scores back in its own way."""

    def __init__(self, nets: list[nn.Module], after: Callable[[Tensor], Any], vote: str = "softmax") -> None:
        super().__init__(nets, vote)
        self.after = after
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.after(super().forward(x))


class Majority(nn.Module):
    """A hard vote that somebody wrote, whose scores have no gradient."""

    def __init__(self, nets: list[nn.Module], weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        self.nets, self.weights = nn.ModuleList(nets), weights
        self.eval()

    def vote(self, logits_MNK: Any) -> Tensor:
        votes = (F.one_hot(logits.argmax(-1), logits.shape[-1]).float() for logits in logits_MNK)
        return sum(weight * vote for weight, vote in zip(self.weights, votes, strict=True))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.vote([net(x) for net in self.nets])


class Mean(Majority):
    """The same members' mean logits."""

    def vote(self, logits_MNK: Any) -> Tensor:
        return torch.stack([*logits_MNK]).mean(0)


def images(n: int = N, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


def labelled(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the model predicts, but for the last image, which is labelled falsely."""
    with torch.no_grad():
        scores_NK = model.eval()(x)
    y = scores_NK.argmax(1)
    y[-1] = scores_NK[-1].argmin()
    return y


def works(model: Any, twin: nn.Module, **others: Any) -> Case:
    """Return a case that must do what its twin does."""
    x = others.pop("x", None)
    x = images() if x is None else x
    y = others.pop("y", None)
    return Case(model, twin, x, labelled(twin, x) if y is None else y, **others)


def refused(model: Any, **others: Any) -> Case:
    x = images()
    return Case(model, None, x, torch.arange(len(x)) % 2, **others)


BEHAVIOURS: dict[str, Callable[[], Case]] = {}


def behaviour(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def add(make: Callable[[], Case]) -> Callable[[], Case]:
        BEHAVIOURS[name] = make
        return make

    return add


def _scaled(x: Tensor) -> Tensor:
    return (x - 0.5) / 0.25


def _scaled_in_place(x: Tensor) -> Tensor:
    return x.sub_(0.5).div_(0.25)


IN_PLACE: dict[str, Callable[[], Case]] = {
    "members scale their input in place": lambda: works(
        Ensemble([Wrapped(net, _scaled_in_place) for net in members()]).eval(),
        Ensemble([Wrapped(net, _scaled) for net in members()]).eval(),
    ),
    "a hard vote's member writes": lambda: works(
        Ensemble([Wrapped(members()[0], lambda x: x.clamp_(0.4, 0.6)), *members()[1:]], "voting").eval(),
        Ensemble([Wrapped(members()[0], lambda x: x.clamp(0.4, 0.6)), *members()[1:]], "voting").eval(),
    ),
    "a single network writes": lambda: works(Wrapped(member(), _scaled_in_place), Wrapped(member(), _scaled)),
    "nn.ReLU(inplace=True) comes first": lambda: works(
        nn.Sequential(nn.ReLU(inplace=True), member()).eval(), nn.Sequential(nn.ReLU(), member()).eval()
    ),
    "an adopted original writes": lambda: works(
        as_ensemble(Mean([Wrapped(net, _scaled_in_place) for net in members()]), list(NAMES), "logits"),
        as_ensemble(Mean([Wrapped(net, _scaled) for net in members()]), list(NAMES), "logits"),
    ),
    "a randomized ensemble's members write": lambda: works(
        RandomizedEnsemble([Wrapped(net, _scaled_in_place) for net in members()], seed=0).eval(),
        RandomizedEnsemble([Wrapped(net, _scaled) for net in members()], seed=0).eval(),
        random=True,
    ),
}
BEHAVIOURS.update({f"in place: {name}": make for name, make in IN_PLACE.items()})


@behaviour("in place: one buffer for every answer")
def same_buffer() -> Case:
    net = member()
    kept: dict[torch.Size, Tensor] = {}

    def after(scores: Tensor) -> Tensor:
        if scores.requires_grad:
            return scores
        return kept.setdefault(scores.shape, torch.empty_like(scores)).copy_(scores)

    return works(Wrapped(net, after=after), net)


class Active(nn.Module):
    """Something random before a network, in training mode although the whole is in eval mode."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.net = layer, Ensemble(members())
        self.eval()
        self.layer.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.layer(x))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.randn_like(x) if self.training else x


def drawn(model: nn.Module) -> Case:
    x = images()
    return Case(model, model, x, labelled(Ensemble(members()), x), random=True)


def _one_of(x: Tensor) -> Tensor:
    return random.choice((x, 1 - x))


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: Active(nn.Dropout(0.5)),
    "dropout of channels": lambda: Active(nn.Dropout2d(0.5)),
    "alpha dropout": lambda: Active(nn.AlphaDropout(0.5)),
    "RReLU": lambda: Active(nn.RReLU(0.1, 2.0)),
    "stochastic depth": lambda: Active(torchvision.ops.StochasticDepth(0.5, "row")),
    "DropBlock": lambda: Active(torchvision.ops.DropBlock2d(0.5, 3)),
    "noise of one's own": lambda: Active(Noise()),
    "scripted dropout": lambda: Active(torch.jit.script(nn.Dropout(0.5))),
    "always dropping": lambda: Wrapped(Ensemble(members()), lambda x: F.dropout(x, 0.5, training=True)),
    "always noisy": lambda: Wrapped(Ensemble(members()), lambda x: x + 0.5 * torch.randn_like(x)),
    "numpy's noise": lambda: Wrapped(
        Ensemble(members()),
        lambda x: x + 0.5 * torch.as_tensor(np.random.randn(*x.shape), dtype=x.dtype),  # noqa: NPY002
    ),
    "Python's choice": lambda: Wrapped(Ensemble(members()), _one_of),
    "a randomized ensemble": lambda: RandomizedEnsemble(members(), [0.5, 0.3, 0.2], seed=0).eval(),
}
BEHAVIOURS.update({f"random: {name}": functools.partial(lambda make: drawn(make()), make) for name, make in RANDOM.items()})


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


Named = namedtuple("Named", "logits hidden")
ANSWERS: dict[str, Callable[[Tensor], Any]] = {
    "a tuple of one": lambda z: (z,),
    "a list of one": lambda z: [z],
    "a dictionary with logits": lambda z: {"logits": z, "features": z[:, :2]},
    "a dictionary of one": lambda z: OrderedDict(out=z),
    "a dataclass with logits": lambda z: Output(z, z.sum()),
    "a named tuple with logits": lambda z: Named(z, z),
    "a subclass of Tensor": lambda z: z.as_subclass(_Carrying),
}


class _Carrying(Tensor):
    pass


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "a tuple of two": lambda z: (z, z),
    "a dictionary of two": lambda z: {"a": z, "b": z},
    "None": lambda z: None,
    "a numpy array": lambda z: z.detach().numpy(),
    "one number an image": lambda z: z[:, 0],
    "one class": lambda z: z[:, :1],
    "a map of scores": lambda z: z[:, :, None, None].expand(-1, -1, 2, 2),
    "one score for the whole batch": lambda z: z.mean(0),
    "integers": lambda z: z.argsort(1),
    "complex numbers": lambda z: z.to(torch.complex64),
    "a batch of one squeezed": lambda z: z.squeeze(0),
}
for _name, _after in ANSWERS.items():
    BEHAVIOURS[f"returns {_name}"] = functools.partial(
        lambda after: works(Answering(members(), after), Ensemble(members()).eval()), _after
    )
    BEHAVIOURS[f"one network returns {_name}"] = functools.partial(
        lambda after: works(Wrapped(member(), after=after), member()), _after
    )
for _name, _after in REFUSED.items():
    BEHAVIOURS[f"returns {_name}"] = functools.partial(lambda after: refused(Answering(members(), after)), _after)
    BEHAVIOURS[f"one network returns {_name}"] = functools.partial(
        lambda after: refused(Wrapped(member(), after=after)), _after
    )
BEHAVIOURS["members of other numbers of classes"] = lambda: refused(Ensemble([member(0, 5), member(1, 4)]).eval())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


for _dtype in (torch.half, torch.bfloat16, torch.double):
    for _given in ("its own", "float32"):

        def _precise(dtype: torch.dtype = _dtype, given: str = _given) -> Case:
            model = Ensemble(members()).eval().to(dtype)
            x = images().to(dtype)
            y = labelled(model, x)
            if given == "its own":
                return Case(model, model, x, y)
            return Case(Wrapped(model, lambda x: x.to(dtype)), Wrapped(model, lambda x: x.to(dtype)), x.float(), y)

        BEHAVIOURS[f"{_dtype} model, images of {_given}"] = _precise
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "under inference_mode": torch.inference_mode,
    "under no_grad": torch.no_grad,
    "under another default dtype": lambda: default_dtype(torch.double),
    "under autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
for _name, _context in CONTEXTS.items():
    BEHAVIOURS[_name] = functools.partial(
        lambda context: works(Ensemble(members()).eval(), Ensemble(members()).eval(), within=context), _context
    )


@behaviour("tensors made under inference_mode")
def inference_tensors() -> Case:
    case = works(Ensemble(members()).eval(), Ensemble(members()).eval())
    with torch.inference_mode():
        case.x, case.y = case.x.clone(), case.y.clone()
    return case


for _dtype in (torch.uint8, torch.uint16, torch.int16, torch.int32):

    def _labels(dtype: torch.dtype = _dtype) -> Case:
        case = works(Ensemble(members()).eval(), Ensemble(members()).eval())
        case.y = case.y.to(dtype)
        return case

    BEHAVIOURS[f"labels of {_dtype}"] = _labels
for _name, _y in {
    "floating labels": torch.zeros(N),
    "labels out of range": torch.full((N,), CLASSES),
    "negative labels": torch.full((N,), -1),
    "too few labels": torch.zeros(N - 1, dtype=torch.long),
}.items():
    BEHAVIOURS[_name] = functools.partial(lambda y: Case(Ensemble(members()).eval(), None, images(), y), _y)


class Owner:
    """Something that holds a network, and is none."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def predict(self, x: Tensor) -> Tensor:
        return self.net(x)


@behaviour("a bound forward")
def bound() -> Case:
    model = Ensemble(members()).eval()
    return works(model.forward, Ensemble(members()).eval(), modules=[model])


@behaviour("a lambda")
def closure() -> Case:
    net = member()
    return works(lambda x: net(x), member(), modules=[net])


@behaviour("a partial")
def partial() -> Case:
    net = member()
    return works(functools.partial(lambda net, x: net(x), net), member(), modules=[net])


@behaviour("a method of another object")
def method() -> Case:
    owner = Owner(member())
    return works(owner.predict, member(), modules=[owner.net])


for _classes in (2, 3, 4):

    def _few(classes: int = _classes) -> Case:
        return works(Ensemble(members(3, classes)).eval(), Ensemble(members(3, classes)).eval())

    BEHAVIOURS[f"{_classes} classes"] = _few
for _shape, _norm in (((3, 6, 9), "L2"), ((3, 6, 9), "Linf"), ((1, 3, 3), "L2"), ((1, 8, 8), "L1"), ((3, 6, 9), "L1")):

    def _shaped(shape: tuple[int, ...] = _shape, norm: str = _norm) -> Case:
        model = Ensemble(members(3, CLASSES, shape)).eval()
        return works(model, Ensemble(members(3, CLASSES, shape)).eval(), x=images(N, shape), norm=norm)

    BEHAVIOURS[f"images of {_shape}, {_norm}"] = _shaped


def counted() -> nn.Module:
    return Ensemble(members(), "voting").eval()


def weighted() -> Majority:
    return Majority(members(), (0.5, 0.3, 0.2))


VOTES: dict[str, Callable[[], Case]] = {
    "counted by name": lambda: works(counted(), counted()),
    "counted, not adopted": lambda: works(Majority(members()), Majority(members())),
    "counted, adopted": lambda: works(
        as_ensemble(Majority(members()), list(NAMES), "voting"), Majority(members()), rival=counted()
    ),
    "counted, adopted as a list": lambda: works(
        as_ensemble(Majority(members()), "nets", "voting"), Majority(members()), rival=counted()
    ),
    "counted, as a function": lambda: works(
        as_ensemble(Majority(members()), list(NAMES), Majority(members()).vote), Majority(members()), rival=counted()
    ),
    "weighted, as a function": lambda: works(as_ensemble(weighted(), list(NAMES), weighted().vote), weighted()),
    "mean logits": lambda: works(Ensemble(members(), "logits").eval(), Mean(members())),
    "CrossMax": lambda: works(CrossMax(members(6)).eval(), CrossMax(members(6)).eval()),
}
BEHAVIOURS.update({f"vote: {name}": make for name, make in VOTES.items()})


@behaviour("scores without gradient")
def detached() -> Case:
    return works(Answering(members(), lambda z: z.detach()), Answering(members(), lambda z: z.detach()))


class ModelError(Exception):
    """What a model of somebody raises."""


class Breaking(Ensemble):
    def __init__(self, after: int) -> None:
        super().__init__(members())
        self.calls, self.after = 0, after
        self.eval()

    def member_logits(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.after:
            raise ModelError("a model's own error")
        return super().member_logits(x)


for _after_calls in (0, 3, 25):

    def _breaking(calls: int = _after_calls) -> Case:
        return works(Breaking(calls), Ensemble(members()).eval(), breaks=True)

    BEHAVIOURS[f"raises after {_after_calls} passes"] = _breaking


class DistributedDataParallel(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module = net
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class FullyShardedDataParallel(DistributedDataParallel):
    pass


COLLECTIVE: dict[str, Callable[[], nn.Module]] = {
    "a DDP wrapper": lambda: DistributedDataParallel(Ensemble(members()).eval()),
    "an FSDP wrapper": lambda: FullyShardedDataParallel(Ensemble(members()).eval()),
    "a DDP wrapper as a member": lambda: Ensemble([DistributedDataParallel(member()), member(1)]).eval(),
}
BEHAVIOURS.update({name: functools.partial(lambda make: refused(make()), make) for name, make in COLLECTIVE.items()})


class Counting(Ensemble):
    """An ensemble that keeps a state of its own at every pass."""

    def __init__(self) -> None:
        super().__init__(members())
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))
        self.eval()

    def member_logits(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().member_logits(x)


class Seeding(Ensemble):
    def member_logits(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        random.seed(3)
        return super().member_logits(x)


@behaviour("in training mode, with batch norm")
def training() -> Case:
    def make() -> nn.Module:
        return Ensemble([nn.Sequential(nn.BatchNorm2d(3), net) for net in members()])

    return works(make().train(), make().eval())


@behaviour("parts in training mode")
def partly_training() -> Case:
    def make() -> nn.Module:
        return Ensemble([nn.Sequential(nn.BatchNorm2d(3), net) for net in members()]).eval()

    model = make()
    model.members[1].train()  # type: ignore[union-attr, index]
    return works(model, make())


STATES: dict[str, Callable[[], nn.Module]] = {
    "counts its images in a buffer": Counting,
    "seeds all generators": lambda: Seeding(members()).eval(),
    "parameters without gradient": lambda: Ensemble(members()).eval().requires_grad_(False),
}
for _name, _make in STATES.items():
    BEHAVIOURS[_name] = functools.partial(lambda make: works(make(), Ensemble(members()).eval()), _make)


@behaviour("gradients of the caller")
def grads() -> Case:
    model = Ensemble(members()).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return works(model, Ensemble(members()).eval())


for _value in (float("nan"), float("inf"), float("-inf")):

    def _broken(value: float = _value) -> Case:
        x = images()
        x[0] = 1.0

        def after(net: nn.Module) -> nn.Module:
            return _Corner(net, value)

        return works(after(Ensemble(members()).eval()), after(Ensemble(members()).eval()), x=x)

    BEHAVIOURS[f"{_value} for white images"] = _broken


class _Corner(nn.Module):
    def __init__(self, net: nn.Module, value: float) -> None:
        super().__init__()
        self.net, self.value = net, value
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.flatten(1).mean(1, keepdim=True) > 0.9, self.value, self.net(x))


class Purified(nn.Module):
    """A front end that hands on images of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.frontend, self.net = nn.Upsample(scale_factor=2), nn.Sequential(OrderedDict(head=Head(CLASSES, 192)))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.avg_pool2d(self.frontend(x), 2))


@behaviour("a front end that changes the shape")
def purified() -> Case:
    torch.manual_seed(0)
    model = Purified()
    return works(model, model)
