"""One self-contained HTML page: headings, numbers, plots and pictures, no script and no request to anywhere."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from pretrain.data.decode import decode_image

SIDE = 320  # pixels of a picture on the page, at most
STYLE = """
:root{--ink:#1d2530;--soft:#66717f;--line:#e3e7ec;--ground:#f6f7f9;--card:#fff;--bar:#3b6fb6;--pale:#dbe6f4}
@media(prefers-color-scheme:dark){:root{--ink:#e8ebef;--soft:#9aa5b1;--line:#313a45;--ground:#161a20;--card:#1f252d;
--bar:#6ea0e4;--pale:#2a3a52}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI","Liberation Sans","DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:36px 24px 64px}h1{font-size:28px;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:18px;margin:40px 0 14px}p.lead{margin:0 0 24px;color:var(--soft)}p.note{color:var(--soft);margin:0 0 14px}
.tiles,.plots,.pictures,.pairs{display:grid;gap:14px}.tiles{grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.plots{grid-template-columns:repeat(auto-fit,minmax(340px,1fr))}
.pictures{grid-template-columns:repeat(auto-fill,minmax(170px,1fr))}
.pairs{grid-template-columns:repeat(auto-fit,minmax(400px,1fr))}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:10px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;min-width:0}
.number{font-size:24px;font-weight:600;letter-spacing:-.02em}.label{color:var(--soft);font-size:13px}
.card h3{font-size:14px;margin:0 0 8px;font-weight:600}.card.bad .number{color:#c0392b}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden;min-width:0}
figure.plain{border:0;border-radius:0}figure img{display:block;width:100%;height:170px;object-fit:contain;
background:repeating-conic-gradient(var(--ground) 0 25%,var(--card) 0 50%) 0 0/16px 16px}
figcaption{padding:8px 10px 10px;font-size:13px;overflow-wrap:anywhere}figcaption small{display:block;color:var(--soft);
margin-top:4px;font-size:11px}table{border-collapse:collapse;width:100%;font-size:13px}td,th{text-align:left;
padding:4px 8px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}td.n,th.n{text-align:right;
font-variant-numeric:tabular-nums}svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}
svg .bar{fill:var(--bar)}svg .axis{stroke:var(--line)}svg .value{fill:var(--ink)}
footer{margin-top:44px;color:var(--soft);font-size:12px}
"""


def page(title: str, lead: str, parts: Iterable[str], foot: str) -> str:
    """Return a whole page; `parts` are pieces of HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>{text(title)}</h1>"
        f'<p class="lead">{text(lead)}</p>{"".join(parts)}<footer>{text(foot)}</footer></main></body></html>\n'
    )


def text(words: str) -> str:
    """Return text as HTML; what cannot be encoded is shown as a question mark."""
    return html.escape(words.encode("utf-8", "replace").decode())


def section(title: str, body: str, *, note: str = "") -> str:
    """Return a heading, a sentence and what follows."""
    return f"<h2>{text(title)}</h2>" + (f'<p class="note">{text(note)}</p>' if note else "") + body


def tiles(numbers: Sequence[tuple[str, str]]) -> str:
    """Return (label, number) as a row of tiles."""
    cards = (
        f'<div class="card"><div class="number">{text(number)}</div><div class="label">{text(label)}</div></div>'
        for label, number in numbers
    )
    return f'<div class="tiles">{"".join(cards)}</div>'


def card(title: str, body: str) -> str:
    """Return something under a small heading."""
    return f'<div class="card"><h3>{text(title)}</h3>{body}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """Return a table; numbers stand to the right."""

    rows = list(rows)
    right = [bool(rows) and isinstance(value, int) for value in (rows[0] if rows else head)]

    def line(tag: str, values: Sequence[str | int]) -> str:
        shown = [f"{value:,}" if isinstance(value, int) else value for value in values]
        cells = (f"<{tag}{' class=n' * to}>{text(words)}</{tag}>" for words, to in zip(shown, right))
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def picture(data: bytes, caption: str, small: str) -> str:
    """Return an encoded image, made small, with words under it.

    Raises:
        DecodeError: it cannot be decoded.
    """
    image = Image.fromarray(decode_image(data))
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=82, method=4)
    source = base64.b64encode(out.getvalue()).decode()
    return (
        f'<figure><img src="data:image/webp;base64,{source}" alt="{text(caption[:200])}">'
        f"<figcaption>{text(caption)}<small>{text(small)}</small></figcaption></figure>"
    )
