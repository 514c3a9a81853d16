"""Read what names of models, data and attacks say: ``kind:body``, parts joined by ``+``, options as ``?key=value``.

A part that has options of its own stands in parentheses: ``ensemble:(nets.py:make?width=8)+timm:resnet18?vote=voting``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

FILE_FUNCTION = re.compile(r"(?P<where>.+\.py):(?P<function>[A-Za-z_]\w*)")
MODULE_FUNCTION = re.compile(r"(?P<where>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")
KIND = re.compile(r"(?P<kind>[A-Za-z_]\w*):(?P<body>.*)", re.DOTALL)


def literal(text: str) -> Any:
    """Return the number, fraction (``8/255``), tuple or other Python literal that a text stands for, else the text."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else ast.literal_eval(text)
    except (ValueError, SyntaxError, ZeroDivisionError, OverflowError, MemoryError, RecursionError):
        return text


def options_in(query: str) -> dict[str, Any]:
    """Return the options of ``key=value&key=value``, their values as `literal` reads them.

    >>> options_in("probabilities=0.5,0.3,0.2&per=batch")
    {'probabilities': (0.5, 0.3, 0.2), 'per': 'batch'}
    """
    return {key: literal(value) for key, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)}


def split_options(name: str) -> tuple[str, str]:
    """Return a name without its options, and these; what stands in parentheses is a part's."""
    body, *rest = outermost(unwrapped(name), "?", 1)
    return body, rest[0] if rest else ""


def outermost(text: str, mark: str, most: int = -1) -> list[str]:
    """Split a text at a mark, ``most`` times, but not within parentheses.

    >>> outermost("(a.py:f?x=1+1)+b", "+")
    ['(a.py:f?x=1+1)', 'b']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == mark and depth == 0 and most:
            parts.append("")
            most -= 1
        else:
            parts[-1] += character
    return parts


def unwrapped(part: str) -> str:
    """Return a part without the parentheses around it."""
    return part[1:-1] if part.startswith("(") and part.endswith(")") and len(outermost(part[1:-1], ")")) == 1 else part


def absolute(name: str, known: Callable[[str], bool]) -> str:
    """Return a name with the paths in it made absolute; those that are ``known`` otherwise, or are no paths, stay."""
    body, query = split_options(name)
    end = f"?{query}" if query else ""
    if known(body) or not body:
        return name
    if match := FILE_FUNCTION.fullmatch(body):
        return f"{Path(match['where']).resolve()}:{match['function']}{end}"
    if (match := KIND.fullmatch(body)) and not Path(body).exists():
        parts = [absolute(unwrapped(part), known) for part in outermost(match["body"], "+")]
        marked = [f"({part})" if "?" in part else part for part in parts]
        return f"{match['kind']}:{'+'.join(marked)}{end}"
    return f"{Path(body).resolve()}{end}" if Path(body).exists() else name
