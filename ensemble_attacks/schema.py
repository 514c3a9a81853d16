"""Say what files of others may hold, in one place: types, ranges, lengths; whatever else they hold is refused in one line.

What is read is bounded before it is read (`files.read_whole`), parsed without recursion that could overflow, and checked
against a model of this file; nothing in it is run, followed or expanded.
"""

from __future__ import annotations

import tomllib
from math import prod
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from ensemble_attacks.files import read_whole
from ensemble_attacks.threat import Threat

MOST_JSON = 16 << 20  # bytes of one file of JSON
MOST_TOML = 1 << 20
MOST_IMAGES = 10_000_000
MOST_UNITS = 10_000_000
MOST_DRAWS = 10_000

Text = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Said = Annotated[str, StringConstraints(max_length=2000)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Passes = Annotated[int, Field(ge=0, le=2**60)]
Index = Annotated[int, Field(ge=0, le=MOST_IMAGES)]
Many = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
Draws = Annotated[int, Field(ge=1, le=MOST_DRAWS)]
Radius = Annotated[float, Field(gt=0, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]


class Record(BaseModel):
    """A record of a file: strict in its types; what it does not name is let through, and not used."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class ListedSweep(Record):
    """What a manifest asks for: at least one unit, and no more than `MOST_UNITS`."""

    models: Annotated[list[Text], Field(min_length=1, max_length=10_000)]
    eps: Annotated[list[Radius], Field(min_length=1, max_length=10_000)]
    attacks: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    votes: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=100_000)]
    dataset: Text
    n: Many
    shard_size: Many
    cascade: bool
    norm: Text
    batch_size: Many
    draws: Draws
    eot_iter: Draws | None
    amp: bool
    tune: bool = False
    first: Index
    sample: Many | None
    only_correct: bool
    transform: Said

    @model_validator(mode="after")
    def bounded(self) -> ListedSweep:
        lists: list[list[Any]] = [self.models, self.votes, self.eps, self.seeds, self.attacks]
        for values in lists:
            if len(set(values)) < len(values):
                raise ValueError("a list holds something twice")
        if self.shard_size > self.n:
            raise ValueError(f"shard_size is {self.shard_size}, of {self.n} images")
        if (units := prod(map(len, lists)) * -(-self.n // self.shard_size)) > MOST_UNITS:
            raise ValueError(f"it asks for {units:,} units, more than {MOST_UNITS:,}")
        return self


class Places(Record):
    """Where models and data lie: ``paths`` by name, and the names of what a Python program has ``given``."""

    model_dir: Text | None
    data_dir: Text
    paths: dict[Text, Text]
    given: list[Text]


class Origin(Record):
    """By what source a user's own model can be told from another (`evaluation.origins`)."""

    files: dict[Text, Hash]
    classes: dict[Text, Hash]
    environment: dict[Text, Text]


class StoredManifest(Record):
    """What decides a run; ``rows`` are the numbers of its images, ``None``: the first; ``images`` is how many there are.

    ``threat`` is where inputs may go (`Threat`); it is there where that is not all of [0, 1].
    """

    sweep: ListedSweep
    weights: dict[Text, Text]
    made: dict[Text, Text]
    origins: dict[Text, Origin]
    data: Text
    rows: list[Index] | None
    images: Many
    code: Text
    places: Places
    missing: Annotated[list[Text], Field(max_length=MOST_UNITS)] = []  # of a bundle: the units that were given up
    threat: dict[str, Any] | None = None

    @field_validator("threat")
    @classmethod
    def readable(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        Threat.restored(value)
        return value

    @model_validator(mode="after")
    def complete(self) -> StoredManifest:
        for what, known in (("weights", self.weights), ("made", self.made)):
            if missing := [name for name in self.sweep.models if name not in known]:
                raise ValueError(f"{what}: there is nothing on {missing[0][:100]}")
        if self.rows is not None and not len(self.rows) == len(set(self.rows)) == self.sweep.n:
            raise ValueError(f"rows holds {len(set(self.rows))} of {self.sweep.n} images")
        if max(self.rows or [self.sweep.n - 1]) >= self.images:
            raise ValueError(f"rows or n name images beyond {self.images}")
        return self


class Step(Record):
    """A row of a trace (`descent.stages.Trace.rows`)."""

    stage: int
    step: int
    fooled: Passes
    robust: int
    forwards: Passes
    backwards: Passes
    loss: float | None = None


class UnitInfo(Record):
    """The numbers of a unit; ``unit`` is compared with the unit that is asked for, key by key."""

    unit: dict[str, Any]
    tensors: Hash
    forwards: Passes
    backwards: Passes
    stages: Annotated[dict[Text, Annotated[list[Passes], Field(min_length=2, max_length=2)]], Field(max_length=100)]
    trace: Annotated[list[Step], Field(max_length=100_000)]
    seconds: Seconds
    outside: Index
    disagreement: Index
    zero_gradients: Index
    failed: Annotated[dict[Text, Said], Field(max_length=100)]
    batch_size: Annotated[int, Field(ge=1)]
    finished: Seconds
    torch: Text


class StoredUnit(Record):
    """The content of a unit, as marks and failures carry it."""

    model: Text
    vote: Text
    eps: Radius
    seed: Seed
    attack: Text
    before: Annotated[list[Text], Field(max_length=1000)]
    range: Annotated[list[Index], Field(min_length=2, max_length=2)]


class Failure(Record):
    unit: StoredUnit
    failures: Annotated[int, Field(ge=0, le=10**6)]
    error: str


class Mark(Record):
    unit: StoredUnit | None = None
    host: str
    machine: str = ""
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    parent: int = 0


class StoredState(Record):
    """What a stored run of AutoAttack says beside its tensors (`hosts.state`); ``identity`` is compared, key by key."""

    identity: dict[str, Any]
    current: Said
    flags: Annotated[list[Annotated[list[Said | float], Field(min_length=3, max_length=3)]], Field(max_length=1000)]
    failed: Annotated[dict[Text, Said], Field(max_length=1000)]
    stages: Annotated[list[Text], Field(max_length=1000)]


class StoredTraining(Record):
    """What a checkpoint of a training keeps beside its tensors (`defenses.training`); ``run`` is compared, key by key."""

    run: dict[str, Any]
    ensemble: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    epoch: Annotated[float, Field(ge=0, le=1e9)]
    seconds: Seconds
    loss: float
    rounds: Annotated[int, Field(ge=0, le=10**9)] | None = None


Channels = Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(min_length=1, max_length=64)]


class Preset(Record):
    """What timm's ``pretrained_cfg`` says of the images that a network takes."""

    mean: Channels | None = None
    std: Channels | None = None


class Published(Record):
    """What the files beside weights of timm or transformers say: ``config.json`` and ``preprocessor_config.json``."""

    architecture: Text | None = None
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    pretrained_cfg: Preset | None = None
    do_normalize: bool | None = None
    image_mean: Channels | None = None
    image_std: Channels | None = None


class About(Record):
    """What a bundle says of itself (RobustBench's ``model_info``, and ours)."""

    name: Text | None = None
    vote: Text | None = None
    dataset: Text | None = None
    threat_model: Text | None = None
    eps: Annotated[str, StringConstraints(max_length=40)] | Radius | None = None
    n_examples: Many | None = None
    draws: Draws | None = None
    clean_acc: Annotated[str, StringConstraints(max_length=40)] | Annotated[float, Field(ge=0, le=100)] | None = None
    autoattack_acc: Annotated[str, StringConstraints(max_length=40)] | Annotated[float, Field(ge=0, le=100)] | None = None
    external: Annotated[str, StringConstraints(max_length=40)] | Annotated[float, Field(ge=0, le=100)] | None = None
    unreliable: bool | None = None


class Card(Record):
    """What a model's card must say, and the options of its architecture."""

    architecture: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    members: Annotated[int, Field(ge=1, le=1000)]
    sha256: Hash
    num_classes: Annotated[int, Field(ge=2, le=100_000)] | None = None
    negative_slope: Annotated[float, Field(ge=0, le=10)] | None = None
    normalization: Annotated[list[list[float]], Field(min_length=2, max_length=2)] | None = None
    in_channels: Annotated[int, Field(ge=1, le=64)] | None = None
    probabilities: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1, max_length=1000)] | None = None

    @field_validator("normalization")
    @classmethod
    def usable(cls, value: list[list[float]] | None) -> list[list[float]] | None:
        if value is not None and not (1 <= len(value[0]) <= 64 and len(value[1]) <= 64 and all(s > 0 for s in value[1])):
            raise ValueError("expected 1 to 64 means, and as many deviations above 0")
        return value


Known = TypeVar("Known", bound=BaseModel)


def parse(data: bytes) -> Any:
    """Return what JSON holds.

    Raises:
        ValueError: Where it is no JSON, holds NaN or an infinity, or nests more than about 200 levels.
    """
    try:
        return from_json(data, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON that is read here: {str(error)[:200]}") from None


def check(content: Any, kind: type[Known]) -> Known:
    """Return the content as a record of its kind; raise a `ValueError` that says in one line what is wrong first."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}: expected an object")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part)[:60] for part in first["loc"]) or "it"
        found = repr(first["input"]) if len(first["loc"]) and first["type"] != "missing" else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {message}" + (f", got {found[:60]}" if found else "")) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, kind: type[Known], most: int = MOST_JSON) -> dict[str, Any]:
    """Return the content of a file of JSON that is a record of a kind, as it is.

    Raises:
        FileNotFoundError: Where there is none.
        ValueError: Where it holds something else; says what.
    """
    content = parse(read_whole(path, most))
    check(content, kind)
    assert isinstance(content, dict)
    return content


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a file of TOML that a user names, which may be a link to one.

    Raises:
        FileNotFoundError: Where there is none.
        ValueError: Where it is something else, or nested too deeply.
    """
    data = read_whole(path.resolve(), MOST_TOML)
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {' '.join(str(error).split())[:200]}") from None
