"""Write a report of a run: a page that needs nothing else, and the same as Markdown, CSV and figures."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from tabulate import tabulate

from ensemble_attacks.data import load_dataset
from ensemble_attacks.diagnostics import FEWEST_DIAGNOSED, Check, Diagnosis, diagnose
from ensemble_attacks.diagnostics.findings import FLAG
from ensemble_attacks.diagnostics.meanings import sources_of
from ensemble_attacks.evaluation.chains import Context
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.manifest import warn_of_code
from ensemble_attacks.evaluation.origins import images_of, placed_anew
from ensemble_attacks.evaluation.report import evidence, figures, of_model
from ensemble_attacks.evaluation.report.again import as_command, as_toml
from ensemble_attacks.evaluation.report.argument import flags_of, standard_of, verdict
from ensemble_attacks.evaluation.report.effort import LEVELS, Effort
from ensemble_attacks.evaluation.report.picture import Picture, drawn_alike
from ensemble_attacks.evaluation.report.tables import COLUMNS, in_markdown, table_rows, title_of, without_empty, write_csv
from ensemble_attacks.evaluation.summary import finished, lacking, run_digest, seconds_of
from ensemble_attacks.evaluation.units import Unit, by_cell, threat_of
from ensemble_attacks.files import whole_folder
from ensemble_attacks.models.preserve import private_random_state

MOST_ROWS = 500  # of images, on the page; the CSV beside it has all
OVERVIEW = ("cell", "clean %", "standard suite %", "worst case %", "low", "high", "gap", "flags")
FIRST = ("robust_", "convergence_")  # figures that stand before the flags and behind them; the others follow


@dataclass(frozen=True, eq=False)
class Section:
    """What a report says of one cell: a sentence, figures, the checks, its images one by one, and what was left out."""

    index: int
    title: str
    sentence: str
    overview: tuple[Any, ...]
    pictures: list[Picture]
    diagnosis: Diagnosis | None
    images: list[tuple[Any, ...]]
    members: int
    left_out: str
    flags: list[dict[str, Any]] = field(default_factory=list)
    looked_at: str = ""

    @property
    def unflagged(self) -> list[tuple[Check, list[tuple[str, str]]]]:
        """Return the checks that are no flags, with the pieces of their sources."""
        checks = [] if self.diagnosis is None else self.diagnosis.checks
        return [(check, list(sources_of(check))) for check in checks if check.verdict != FLAG]

    def drawn(self, name: str) -> list[Picture]:
        """Return the pictures whose names begin so; of an empty name, all the others."""
        return [p for p in self.pictures if (p.name.startswith(name) if name else not p.name.startswith(FIRST))]


def write_report(
    run: Path | Ledger,
    out: Path,
    *,
    device: str = "cpu",
    model: str | None = None,
    dataset: str | None = None,
    tell: Callable[[str], object] | None = None,
) -> Path:
    """Write ``report.html``, ``report.md``, CSV and ``figures/`` into ``out``, all or nothing; return the page's path.

    Where units were given up, it is of what is there, and says on how many images each attack is.
    Nothing is written into the run, unless ``out`` lies there.

    Args:
        run: the folder of a finished run, or its ledger.
        out: a new folder.
        device: where the model is asked.
        model, dataset: names that the run's model and data have by now; ``None``: theirs.
        tell: called with what is done next.

    Raises:
        FileNotFoundError, LedgerError: Where there is no run, or one that has not finished.
        FileExistsError: Where ``out`` is there already.
    """
    ledger = run if isinstance(run, Ledger) else Ledger(run)
    ledger.manifest = placed_anew(ledger.manifest, model, dataset)
    summary = finished(ledger)
    absent = lacking(ledger.manifest, summary)
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder (--out)")
    warn_of_code(ledger)
    rows = table_rows(summary, seconds_of(ledger))
    with drawn_alike():
        sections = _sections(ledger, summary, device, tell or str)
        shared = [*figures.by_eps(summary), *figures.by_distance(ledger)]
        with whole_folder(out) as folder:
            (folder / "figures").mkdir()
            for picture in [*shared, *(picture for section in sections for picture in section.pictures)]:
                (tell or str)(f"drawing {picture.name}")
                picture.save(folder / "figures")
            (folder / "report.html").write_text(_page(ledger, rows, absent, sections, shared))
            (folder / "report.md").write_text(_markdown(ledger, rows, absent, sections, shared))
            write_csv(folder / "table.csv", COLUMNS, rows)
            for section in sections:
                write_csv(folder / f"images_{section.index}.csv", evidence.COLUMNS, section.images)
    return out / "report.html"


def _sections(ledger: Ledger, summary: dict[str, Any], device: str, tell: Callable[[str], object]) -> list[Section]:
    """Return what is said of every cell."""
    drawn = figures.of_cells(ledger, summary)
    return [
        _section(ledger, chains, summary["cells"][index], drawn[index], index, device, tell)
        for index, (_, chains) in enumerate(by_cell(ledger.manifest))
    ]


def _section(
    ledger: Ledger,
    chains: list[list[Unit]],
    shown: dict[str, Any],
    drawn: list[Picture],
    index: int,
    device: str,
    tell: Callable[[str], object],
) -> Section:
    unit = chains[0][0]
    context = Context(ledger.manifest, unit, device, same_code=False)
    effort, settings, net = Effort.of(context), context.settings, context.model
    tell(f"asking {unit.cell.title}")
    gathered = evidence.gather(ledger, chains, context)
    linf, several = settings.norm == "Linf", hasattr(net, "member_logits")  # Linf is what the checks are made for
    pictures: list[Picture | None] = [*drawn]
    diagnosis = None
    if any(unit.attack in shown["attacks"] for unit in chains[0]):
        with private_random_state(settings.seed, net):
            pictures.append(of_model.gallery(context, gathered, unit, index))
            twin = of_model.twin_of(context)
            if linf and effort.grid:
                pictures.append(of_model.surface(context, twin, unit, index, effort.grid))
            if several:
                pictures.append(of_model.members(gathered, unit, index))
                if linf and effort.transferred and of_model.one_share(settings):
                    pictures.append(of_model.transfer(context, twin, unit, index, effort.transferred))
        if linf and effort.diagnosed:
            tell(f"looking into {unit.cell.title}")
            diagnosis = _diagnosis(ledger, context, effort)
    worst, standard = shown.get("worst_case"), standard_of(shown)
    return Section(
        index=index,
        title=unit.cell.title,
        sentence=verdict(shown, diagnosis),
        overview=_overview(unit.cell.title, shown, worst, standard, diagnosis),
        pictures=[picture for picture in pictures if picture],
        diagnosis=diagnosis,
        images=[found.row for found in gathered.images],
        members=gathered.members,
        left_out=effort.left_out if linf else "",
        flags=[] if diagnosis is None else flags_of(diagnosis),
        looked_at="" if diagnosis is None else _looked_at(ledger, effort),
    )


def _overview(
    title: str, cell: dict[str, Any], worst: dict[str, Any] | None, standard: str | None, diagnosis: Diagnosis | None
) -> tuple[Any, ...]:
    """Return a cell in one row, in the order of `OVERVIEW`; what is not known is empty."""

    def share(row: dict[str, Any] | None) -> Any:
        return "" if row is None else round(100 * row["accuracy"], 1)

    suite = cell["attacks"][standard] if standard is not None else None
    low, high = ("", "") if worst is None else (round(100 * bound, 1) for bound in worst["interval"])
    gap = "" if suite is None or worst is None else round(100 * (suite["accuracy"] - worst["accuracy"]), 1)
    flags = "" if diagnosis is None else ", ".join(diagnosis.flags) or "none"
    return title, share(cell["clean"]), share(suite), share(worst), low, high, gap, flags


def _diagnosis(ledger: Ledger, context: Context, effort: Effort) -> Diagnosis | None:
    """Return the diagnosis on the run's first images; ``None`` where there are too few, or the checks are not for them."""
    manifest, settings = ledger.manifest, context.settings
    n = _diagnosed(ledger, effort)
    if n < FEWEST_DIAGNOSED or not of_model.one_share(settings):
        return None
    x, y = load_dataset(**images_of(manifest), n=n)
    return diagnose(context.model, x, y, eps=settings.eps, seed=settings.seed, box=settings.box, alone=effort.alone)


def _diagnosed(ledger: Ledger, effort: Effort) -> int:
    """Return the number of images that the checks look at."""
    return min(ledger.manifest["sweep"]["n"], effort.diagnosed)


def _looked_at(ledger: Ledger, effort: Effort) -> str:
    """Return what the checks looked at, as a sentence."""
    n, most = _diagnosed(ledger, effort), LEVELS[0]
    found = f"The checks looked at the first {n} images, and one by one at the first {effort.alone} of these that are right"
    less = f" (of a smaller model, at {most[0]} and {most[1]})" if effort.diagnosed < most[0] else ""
    return f"{found}{less}; `ensemble-attacks diagnose --n` looks at more."


TEMPLATES = Path(__file__).parent


def render_page(template: Path, **content: Any) -> str:
    """Return a self-contained page; the template extends ``page.html.jinja``, and all content is escaped.

    ``inlined(name)`` puts a file beside the template into the page as it is.
    """
    loader = jinja2.FileSystemLoader([template.parent, TEMPLATES])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    environment.filters["code"] = _code
    environment.globals["inlined"] = lambda name: Markup((template.parent / name).read_text())
    return environment.get_template(template.name).render(**content)


def _code(text: str) -> Markup:
    """Return a text, escaped, in which what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _page(
    ledger: Ledger, rows: list[tuple[Any, ...]], absent: list[str], sections: list[Section], shared: list[Picture]
) -> str:
    columns, told = without_empty(rows)
    return render_page(
        TEMPLATES / "report.html.jinja",
        title=title_of(ledger.manifest),
        columns=columns,
        rows=told,
        absent=absent,
        sections=sections,
        lead=_lead(sections),
        overview=OVERVIEW,
        shared=shared,
        evidence=evidence.COLUMNS,
        most=MOST_ROWS,
        command=as_command(ledger.manifest),
        toml=as_toml(ledger.manifest),
        record=_record(ledger),
    )


def _lead(sections: list[Section]) -> str:
    """Return a sentence on all cells: how low the worst case lies, where, and what the standard suite says of the same."""
    columns = {name: index for index, name in enumerate(OVERVIEW)}
    known = [section for section in sections if section.overview[columns["worst case %"]] != ""]
    lowest = min(known, key=lambda section: section.overview[columns["worst case %"]])
    highest = max(known, key=lambda section: section.overview[columns["worst case %"]])
    low, high = (section.overview[columns["worst case %"]] for section in (lowest, highest))
    found = f"{len(sections)} cells: the worst case is {low}% in all of them"
    if low < high:
        found = f"{len(sections)} cells: the worst case lies between {low}% ({lowest.title}) and {high}% ({highest.title})"
    gaps = [section for section in known if section.overview[columns["gap"]] != ""]
    if gaps:
        widest = max(gaps, key=lambda section: section.overview[columns["gap"]])
        suite, worst = (widest.overview[columns[name]] for name in ("standard suite %", "worst case %"))
        found += f"; it is furthest below the standard suite, {worst}% to {suite}%, for {widest.title}"
    flagged = sum(bool(section.flags) for section in sections)
    return f"{found}; {flagged} of them have flags."


def _markdown(
    ledger: Ledger, rows: list[tuple[Any, ...]], absent: list[str], sections: list[Section], shared: list[Picture]
) -> str:
    columns, told = without_empty(rows)
    text = [index for index, column in enumerate(columns) if column in ("model", "vote", "attack")]
    shown = [[in_markdown(value) for value in row] for row in told]
    parts = [f"# {in_markdown(title_of(ledger.manifest))}"]
    parts += [f"{in_markdown(section.title)}: {in_markdown(section.sentence)}" for section in sections]
    parts.append(tabulate(shown, columns, tablefmt="github", disable_numparse=text))
    parts += [f"Not complete: {in_markdown(line)}." for line in absent]
    parts += map(_drawing, shared)
    for section in sections:
        if (diagnosis := section.diagnosis) is not None:
            table = [
                (c.name, c.verdict, f"{c.figure:.2f}", in_markdown(c.meaning), in_markdown(c.source))
                for c in diagnosis.checks
            ]
            parts += [f"## Is the gradient masked? {in_markdown(section.title)}"]
            parts += [f"Flags: {', '.join(diagnosis.flags) or 'none'}. {section.looked_at}"]
            parts += [tabulate(table, ("check", "verdict", "figure", "what it is", "source"), tablefmt="github")]
        if section.left_out:
            parts.append(f"Left out, as it takes too long with this model: {section.left_out}.")
        parts += map(_drawing, section.pictures)
    fenced = [
        part.replace("```", "~~~") for part in (as_command(ledger.manifest), as_toml(ledger.manifest), _record(ledger))
    ]
    command, toml, record = (part.rstrip("\n") for part in fenced)
    again = ["## How to run it again", f"```sh\n{command}\n```", f"```toml\n{toml}\n```", f"```\n{record}\n```"]
    return "\n\n".join([*parts, *again]) + "\n"


def _drawing(picture: Picture) -> str:
    return f"![{in_markdown(picture.caption)}](figures/{picture.name}.png)"


def _record(ledger: Ledger) -> str:
    """Return what the run stands on, hashes and versions, as lines."""
    manifest = ledger.manifest
    threat = threat_of(manifest)
    lines = []
    if not threat.plain:
        several = [said for eps in manifest["sweep"]["eps"] if (said := threat.said(eps))]
        lines += [f"inputs: {said}" for said in dict.fromkeys(several)] + [f"box, mask and eps by feature: {threat.digest}"]
    lines += [f"weights of {model}: {value}" for model, value in manifest["weights"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    lines += [f"images: {manifest['data']}", f"code {manifest['code']}, {versions}", f"digest {run_digest(ledger)}"]
    return "\n".join(lines)
