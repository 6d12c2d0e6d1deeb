"""A self-contained page of a run: headings, tables, curves as inline SVG; no script, no request, all text escaped.

Whatever comes from data or configs goes through `text`: captions are strangers' words.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 200, 52, 26, 10
COLOURS = ("#3b6fb6", "#c8553d", "#3d8f5f", "#8a5fb0", "#b58900", "#4a9aa5")
MOST = 400  # points of a curve that are drawn
STYLE = """
:root{--ink:#1d2530;--soft:#66717f;--line:#e3e7ec;--ground:#f6f7f9;--card:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e8ebef;--soft:#9aa5b1;--line:#313a45;--ground:#161a20;--card:#1f252d}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px}h1{font-size:26px;margin:0}
h2{font-size:18px;margin:36px 0 12px}
p{margin:0 0 12px;color:var(--soft)}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(340px,1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.card h3{font-size:14px;margin:0 0 6px;font-weight:600;overflow-wrap:anywhere}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11px}svg .axis{stroke:var(--line)}table{border-collapse:collapse;font-size:13px}
td,th{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid var(--line);vertical-align:top;
 overflow-wrap:anywhere}
pre{font-size:12px;overflow-x:auto;margin:0}.row{display:flex;gap:8px;flex-wrap:wrap}figure{margin:0;width:110px}
figure img{width:110px;height:110px;object-fit:contain;background:#fff;border:2px solid var(--line);border-radius:6px}
figure.right img,li.right{border-color:#3d8f5f}
li.right,b.right{color:#3d8f5f;font-weight:600}figure.boxed{position:relative;margin-bottom:8px}
figure.boxed svg{position:absolute;inset:2px;width:106px;height:106px}rect.people,rect.found{fill:none;
 stroke:#3d8f5f;stroke-width:.02}rect.found{stroke:#c8553d}
figcaption{font-size:11px;color:var(--soft)}
"""


def text(words: object) -> str:
    """Return anything as HTML text; what cannot be encoded is shown as a question mark."""
    return html.escape(str(words).encode("utf-8", "replace").decode())


def page(title: str, lead: str, parts: Iterable[str]) -> str:
    """Return a whole page; `parts` are pieces of HTML."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{text(title)}</h1><p>{text(lead)}</p>{''.join(parts)}</main></body></html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """Return a heading, a sentence and what follows."""
    return f"<h2>{text(title)}</h2>" + (f"<p>{text(note)}</p>" if note else "") + body


def grid(cards: Iterable[str]) -> str:
    """Return pieces side by side."""
    return f'<div class="grid">{"".join(cards)}</div>'


def card(title: str, body: str) -> str:
    """Return something under a small heading."""
    return f'<div class="card"><h3>{text(title)}</h3>{body}</div>'


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    lines = [f"<tr>{''.join(f'<{tag}>{text(v)}</{tag}>' for v in row)}</tr>" for tag, row in
             [("th", head), *(("td", row) for row in rows)]]  # fmt: skip
    return f"<table>{''.join(lines)}</table>"


def curves(lines: Mapping[str, Points], *, unit: str = "step") -> str:
    """Return curves over a common axis as SVG; values that are not finite are left out."""
    kept = {name: _thin([p for p in points if all(map(math.isfinite, p))]) for name, points in lines.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return "<p>nothing yet</p>"
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    low, high = min(ys), max(ys)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    across = (WIDTH - LEFT - 8) / ((max(xs) - min(xs)) or 1)
    up = (HEIGHT - BOTTOM - TOP) / (high - low)
    shapes = []
    for part in range(4):
        value = low + (high - low) * part / 3
        y = HEIGHT - BOTTOM - (value - low) * up
        shapes.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for x, anchor in ((min(xs), "start"), (max(xs), "end")):
        at = LEFT + (x - min(xs)) * across
        words = f"{unit} {x:,.0f}" if anchor == "end" else f"{x:,.0f}"
        shapes.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{text(words)}</text>')
    for number, (name, points) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [f"{LEFT + (x - min(xs)) * across:.1f},{HEIGHT - BOTTOM - (y - low) * up:.1f}" for x, y in points]
        shapes.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{" ".join(places)}"/>')
        shapes += [
            f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2.5" fill="{colour}"/>' for p in places[-1:]
        ]
        if len(kept) > 1:
            shapes.append(
                f'<text x="{LEFT + 8}" y="{TOP + 12 + 13 * number}" style="fill:{colour}">{text(name)}</text>'
            )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}</svg>'


def _thin(points: Points) -> Points:
    every = -(-len(points) // MOST)
    return [*points[::every], points[-1]] if every > 1 else points
