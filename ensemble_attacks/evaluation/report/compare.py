"""Compare a report that was written with one that is written anew."""

from __future__ import annotations

import math
import re
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.report.pages import write_report
from ensemble_attacks.files import read_whole

MOST = 256 << 20  # bytes of a file of a report
PICTURE = re.compile(rb'src="data:image/(?:svg\+xml|png);base64,[^"]*"')
DRAWN = (".png", ".pdf")
CLOSE = 1e-3  # of the figures behind a drawing, which another machine rounds otherwise


def compare_report(ledger: Ledger, folder: Path, device: str = "cpu") -> tuple[list[str], list[str]]:
    """Return a line for each file of a report that does not say what the run does, and the drawings that are other ones.

    Drawings are compared by their bytes, which another version of matplotlib makes otherwise: no judgement of them is meant.

    Raises:
        LedgerError: Where the run is not finished.
    """
    lines, drawn = [], []
    with TemporaryDirectory() as place:
        write_report(ledger, anew := Path(place) / "report", device=device)
        names = {path.relative_to(anew) for path in anew.rglob("*") if path.is_file()}
        found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
        lines += [f"{name}: does not belong to the report" for name in sorted(found - names)]
        for name in sorted(names):
            try:
                stored, due = read_whole(folder / name, MOST), (anew / name).read_bytes()
            except (FileNotFoundError, ValueError) as error:
                lines.append(f"{name}: {'missing' if isinstance(error, FileNotFoundError) else error}")
                continue
            if (name.suffix in DRAWN and stored != due) or PICTURE.findall(stored) != PICTURE.findall(due):
                drawn.append(str(name))
            if name.suffix not in DRAWN and (line := _first(name, PICTURE.sub(b"", stored), PICTURE.sub(b"", due))):
                lines.append(f"{name}: {line}")
    return lines, drawn


def _first(name: Path, stored: bytes, due: bytes) -> str:
    """Return the first line that differs, for people; of a drawing's data, by more than rounding; empty if none does."""
    pairs = zip_longest(stored.decode(errors="replace").splitlines(), due.decode().splitlines(), fillvalue="")
    for said, right in pairs:
        if said != right and not (name.parts[0] == "figures" and _close(said, right)):
            return f"{said.strip()[:100]!r}, the run says {right.strip()[:100]!r}"
    return ""


def _close(said: str, right: str) -> bool:
    return all(a == b or _near(a, b) for a, b in zip_longest(said.split(","), right.split(","), fillvalue=""))


def _near(said: str, right: str) -> bool:
    try:
        return math.isclose(float(said), float(right), rel_tol=CLOSE, abs_tol=CLOSE)
    except ValueError:
        return False
