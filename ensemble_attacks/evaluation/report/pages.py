"""Write a report of a run: a page that needs nothing else, and the same as Markdown, CSV and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from matplotlib import style
from tabulate import tabulate

from ensemble_attacks.data import load_dataset
from ensemble_attacks.diagnostics import FEWEST_DIAGNOSED, Diagnosis, diagnose
from ensemble_attacks.evaluation.chains import Context
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.manifest import warn_of_code
from ensemble_attacks.evaluation.origins import images_of, placed_anew
from ensemble_attacks.evaluation.report.figures import (
    DIAGNOSED,
    Picture,
    _by_distance,
    _by_eps,
    _curves,
    _of_model,
    _title,
    one_share,
)
from ensemble_attacks.evaluation.report.tables import COLUMNS, in_markdown, table_rows, write_csv
from ensemble_attacks.evaluation.summary import finished, lacking, run_digest, seconds_of
from ensemble_attacks.evaluation.units import Unit, chain_of, count_chains, shards_of, threat_of
from ensemble_attacks.models.preserve import private_random_state

STYLE = "tableau-colorblind10"


def write_report(
    run: Path | Ledger, out: Path, *, device: str = "cpu", model: str | None = None, dataset: str | None = None
) -> Path:
    """Write ``report.html``, ``report.md``, ``table.csv`` and ``figures/`` into ``out``; return the page's path.

    Where units were given up, it is of what is there, and says on how many images each attack is.
    Nothing is written into the run, unless ``out`` lies there.

    Args:
        run: the folder of a finished run, or its ledger.
        out: a new folder.
        device: where the model is asked.
        model, dataset: names that the run's model and data have by now; ``None``: theirs.

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
    with style.context([STYLE, {"text.parse_math": False}]):  # a name with dollars in it is a name
        pictures = [*_curves(ledger), *_by_eps(summary), *_by_distance(ledger)]
        diagnoses: dict[str, Diagnosis] = {}
        for chain in _first_chains(ledger):
            context = Context(ledger.manifest, chain[0], device, same_code=False)
            with private_random_state(context.settings.seed, context.model):
                pictures += _of_model(ledger, chain, context)
            linf = context.settings.norm == "Linf"  # what the checks are made for
            if linf and (diagnosis := _diagnosis(ledger, context)) is not None:
                diagnoses[_title(chain[0])] = diagnosis
        out.mkdir(parents=True)
        (out / "figures").mkdir()
        for picture in pictures:
            picture.save(out / "figures")
        page = _page(ledger, rows, absent, diagnoses, [(picture, picture.png()) for picture in pictures])
    (out / "report.html").write_text(page)
    (out / "report.md").write_text(_markdown(ledger, rows, absent, diagnoses, pictures))
    write_csv(out / "table.csv", COLUMNS, rows)
    return out / "report.html"


def _first_chains(ledger: Ledger) -> list[list[Unit]]:
    """Return the units of every cell on its first images."""
    chains = range(0, count_chains(ledger.manifest), shards_of(ledger.manifest))
    return [chain_of(ledger.manifest, index) for index in chains]


def _diagnosis(ledger: Ledger, context: Context) -> Diagnosis | None:
    """Return the diagnosis on the run's first images; ``None`` where there are too few, or the checks are not for them."""
    manifest = ledger.manifest
    n = min(manifest["sweep"]["n"], DIAGNOSED)
    if n < FEWEST_DIAGNOSED:
        return None
    x, y = load_dataset(**images_of(manifest), n=n)
    settings = context.settings
    if not one_share(settings):
        return None
    return diagnose(context.model, x, y, eps=settings.eps, seed=settings.seed, box=settings.box)


TEMPLATES = Path(__file__).parent


def render_page(template: Path, **content: Any) -> str:
    """Return a self-contained page; the template extends ``page.html.jinja``, and all content is escaped."""
    loader = jinja2.FileSystemLoader([template.parent, TEMPLATES])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    return environment.get_template(template.name).render(**content)


def _page(
    ledger: Ledger, rows: list[tuple[Any, ...]], absent: list[str], diagnoses: dict[str, Diagnosis], pictures: list[Any]
) -> str:
    return render_page(
        TEMPLATES / "report.html.jinja",
        title=_name(ledger),
        columns=COLUMNS,
        rows=rows,
        absent=absent,
        diagnoses=diagnoses,
        pictures=pictures,
        manifest=_manifest(ledger),
    )


def _markdown(
    ledger: Ledger, rows: list[tuple[Any, ...]], absent: list[str], diagnoses: dict[str, Diagnosis], pictures: list[Picture]
) -> str:
    text = [index for index, column in enumerate(COLUMNS) if column in ("model", "vote", "attack")]
    shown = [[in_markdown(value) for value in row] for row in rows]
    parts = [f"# {in_markdown(_name(ledger))}", tabulate(shown, COLUMNS, tablefmt="github", disable_numparse=text)]
    parts += [f"Not complete: {in_markdown(line)}." for line in absent]
    for name, diagnosis in diagnoses.items():
        table = [
            (c.name, c.verdict, f"{c.figure:.2f}", in_markdown(c.meaning), in_markdown(c.source)) for c in diagnosis.checks
        ]
        parts += [f"## Is the gradient masked? {in_markdown(name)}", f"Flags: {', '.join(diagnosis.flags) or 'none'}"]
        parts += [tabulate(table, ("check", "verdict", "figure", "what it is", "source"), tablefmt="github")]
    parts += [f"![{in_markdown(picture.caption)}](figures/{picture.name}.png)" for picture in pictures]
    fenced = _manifest(ledger).replace("```", "~~~")
    return "\n\n".join([*parts, "## How to run it again", f"```\n{fenced}\n```"]) + "\n"


def _name(ledger: Ledger) -> str:
    sweep = ledger.manifest["sweep"]
    return f"{', '.join(sweep['models'])} on {sweep['n']} images of {sweep['dataset']}"


def _manifest(ledger: Ledger) -> str:
    """Return settings, hashes and versions as lines; the settings have the names that a sweep's file gives them."""
    manifest = ledger.manifest
    lines = [f"{key} = {value!r}" for key, value in manifest["sweep"].items() if value is not None]
    threat = threat_of(manifest)
    if not threat.plain:
        several = [said for eps in manifest["sweep"]["eps"] if (said := threat.said(eps))]
        lines += [f"inputs: {said}" for said in dict.fromkeys(several)] + [f"box, mask and eps by feature: {threat.digest}"]
    lines += [f"weights of {model}: {value}" for model, value in manifest["weights"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    lines += [f"images: {manifest['data']}", f"code {manifest['code']}, {versions}", f"digest {run_digest(ledger)}"]
    return "\n".join(lines)
