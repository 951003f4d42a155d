"""The report's HTML: its style, in light and in dark, down to 400 pixels, and the parts that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--ink:#222222;--paper:#ffffff;--soft:#595959;--line:#d8d8d8;--card:#f5f5f5;--link:#0b57a4}
@media (prefers-color-scheme:dark){
:root{--ink:#e4e4e4;--paper:#16181b;--soft:#a6a6a6;--line:#3d4147;--card:#212429;--link:#7db8f0}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:var(--ink);background:var(--paper);overflow-wrap:break-word}
a{color:var(--link)}h1{font-size:1.6rem;line-height:1.25}
h2{font-size:1.25rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
li{margin:.4rem 0}small,figcaption,summary{color:var(--soft)}small{display:block;font-size:.8rem;font-weight:400}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;width:100%}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child,td:first-child,.text{text-align:left}
td.text{width:60%;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1rem}
figure{margin:1rem 0}figure svg{display:block;width:100%;max-width:30rem;height:auto}
figure svg text{font-family:system-ui,sans-serif!important}
figure img{max-width:100%;background:#ffffff}figcaption{font-size:.9rem;max-width:30rem}
pre{background:var(--card);padding:.8rem;overflow:auto;font-size:.8rem}
@media (max-width:40rem){body{margin:1rem auto}
table,tbody,tr,td{display:block;width:auto}tr.head{display:none}
tr{border-bottom:1px solid var(--line);padding:.4rem 0}
td,td.text{border:0;padding:.1rem 0;width:auto}td:first-child{font-weight:600}
td[data-head]{display:flex;justify-content:space-between;gap:1rem}
td[data-head]::before{content:attr(data-head);color:var(--soft);text-align:left}
td.text[data-head]{display:block}td.text[data-head]::before{content:none}}
"""


class Html(str):
    """Text that is markup already."""


class Prose(str):
    """Text as people write it, which a column of its own is kept for."""


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose first column names its rows; where the page is narrow, a block a row, the head beside its cells."""

    def row(cells: Sequence[str]) -> str:
        parts = []
        for place, cell in enumerate(cells):
            name = f" data-head='{escape(head[place])}'" if place and head else ""
            css = " class='text'" if isinstance(cell, Prose) else ""
            parts.append(f"<td{css}{name}>{_safe(cell)}</td>")
        return "<tr>" + "".join(parts) + "</tr>"

    text = {place for cells in body for place, cell in enumerate(cells) if isinstance(cell, Prose)}
    names = [f"<th{' class=text' * (place in text)}>{_safe(cell)}</th>" for place, cell in enumerate(head)]
    top = f"<tr class='head'>{''.join(names)}</tr>" if head else ""
    return f"<table>{top}{''.join(map(row, body))}</table>"


def named(name: str, note: str) -> Html:
    """A row's name with a note beneath it."""
    return Html(f"{escape(name)}<small>{escape(note)}</small>")


def figure(picture: str, caption: str) -> str:
    """A picture, markup already, over its caption."""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def items(sentences: Sequence[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{_safe(sentence)}</li>" for sentence in sentences) + "</ul>"


def details(name: str, text: str) -> str:
    """A text that is folded away."""
    return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"


def _safe(text: str) -> str:
    return text if isinstance(text, Html) else escape(text)
