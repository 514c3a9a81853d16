"""CIFAR-10 in parts small enough to carry to a machine that reaches nothing else."""

from __future__ import annotations

import hashlib
import io
import lzma
import pickle
import tarfile
from pathlib import Path

import click
import numpy as np

FILES = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]
META = "batches.meta"
WIDE = 10  # images side by side in a packed picture
PIECE = 1000  # images of a packed picture


def _squeezed(pixels: np.ndarray) -> bytes:
    """Images (N, 3072), as one lossless picture."""
    from PIL import Image

    tiles = pixels.reshape(-1, WIDE, 3, 32, 32).transpose(0, 3, 1, 4, 2)
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(tiles.reshape(len(tiles) * 32, WIDE * 32, 3)))
    picture.save(file, "webp", lossless=True, quality=80, method=4, exact=True)
    return file.getvalue()


def _unsqueezed(content: bytes) -> np.ndarray:
    from PIL import Image

    picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    tiles = picture.reshape(-1, 32, WIDE, 32, 3).transpose(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3072)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
@click.option("--parts", default=3, show_default=True)
def pack(out: Path, data_dir: Path, parts: int) -> None:
    """CIFAR-10's official files as lossless pictures, about half as large, in tar files from which `unpack` makes them
    again, byte for byte.
    """
    out.mkdir(parents=True, exist_ok=True)
    for index in range(parts):
        with tarfile.open(out / f"{index}.tar", "w") as tar:

            def add(name: str, content: bytes, tar: tarfile.TarFile = tar) -> None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

            for name in FILES[index::parts]:
                raw = (data_dir / "cifar-10-batches-py" / name).read_bytes()
                images = pickle.loads(raw, encoding="bytes")[b"data"]  # noqa: S301 - the official file, checked by unpack
                at = raw.index(images.tobytes())
                add(f"{name}.md5", hashlib.md5(raw).hexdigest().encode())
                add(f"{name}.head", lzma.compress(raw[:at]))
                add(f"{name}.tail", lzma.compress(raw[at + images.nbytes :]))
                for piece in range(len(images) // PIECE):
                    add(f"{name}.{piece}.webp", _squeezed(images[piece * PIECE : (piece + 1) * PIECE]))
            if not index:
                add(META, (data_dir / "cifar-10-batches-py" / META).read_bytes())


@click.command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
def unpack(parts: tuple[Path, ...], data_dir: Path) -> None:
    """Make the official files of what `pack` made."""
    out = data_dir / "cifar-10-batches-py"
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        with tarfile.open(part) as tar:
            held = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in FILES:
            if f"{name}.md5" not in held:
                continue
            pieces = [held[f"{name}.{piece}.webp"] for piece in range(10_000 // PIECE)]
            pixels = b"".join(_unsqueezed(piece).tobytes() for piece in pieces)
            raw = lzma.decompress(held[f"{name}.head"]) + pixels + lzma.decompress(held[f"{name}.tail"])
            if hashlib.md5(raw).hexdigest().encode() != held[f"{name}.md5"]:
                raise click.ClickException(f"{name} of {part} is damaged: pack it again")
            (out / name).write_bytes(raw)
        if META in held:
            (out / META).write_bytes(held[META])
