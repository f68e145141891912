"""Pieces of a page that is one file: tables, pictures and figures inside the HTML."""

import base64
import html
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

mpl.use("Agg")

import matplotlib.pyplot as plt

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em} h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;margin:.6em 0} td,th{padding:.15em .8em .15em 0;text-align:left;
vertical-align:top} th{font-weight:600;white-space:nowrap} pre{font-size:12px;line-height:1.35;
overflow-x:auto;background:#f6f6f6;padding:.8em} img{max-width:100%} .strip img{height:112px;
margin:1px} .strip td{padding:1px 4px 1px 0} .small img{height:72px} .say{font-size:1.1em;
font-style:italic} .bad{color:#a00} .note{color:#666}
"""


def table(rows: Mapping[str, Any], *, escape: bool = True) -> str:
    """Two columns: name and value."""

    def cell(text):
        return html.escape(str(text)) if escape else str(text)

    lines = (f"<tr><th>{html.escape(str(k))}</th><td>{cell(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(lines)}</table>"


def figure(drawn: Any, words: str) -> str:
    """A matplotlib figure, which is closed; `words` say what it shows."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, dpi=90)
    plt.close(drawn)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(words)}" src="data:image/png;base64,{data}"></p>'


def photo(picture: np.ndarray, size: tuple[int, int] = (320, 224)) -> str:
    """A picture uint8[H, W, 3], made smaller where it is larger than `size`."""
    shown = Image.fromarray(picture)
    shown.thumbnail(size)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def film(path: pathlib.Path, words: str, attributes: str) -> str:
    """A film of `evals/videos.py`, inside the page; that of a failure has red words.

    Args:
        path: the mp4, named after its success.
        words: below it.
        attributes: of the video element: how it plays, its size.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure style="display:inline-block;margin:4px"><video {attributes} loop '
        f'src="data:video/mp4;base64,{data}"></video>'
        f'<figcaption class="{"bad" if failed(path) else "note"}">{html.escape(words)}</figcaption>'
        "</figure>"
    )


def failed(path: pathlib.Path) -> bool:
    """Whether the episode of a film failed."""
    return path.stem.endswith("-failure")


def write(target: pathlib.Path, title: str, parts: Sequence[str]) -> None:
    """Write the page."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>" + "\n".join(parts)
    )
