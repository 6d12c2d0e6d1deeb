"""Plots as inline SVG: bars of a histogram, and a field of shades for two quantities."""

from collections.abc import Sequence

from data_tools._page import text

WIDTH, HEIGHT = 460, 210
LEFT, RIGHT, TOP, BOTTOM = 8, 8, 18, 34
WIDEST = 64  # a column, however few there are
LABELS = 9  # under an axis, at most


def bars(rows: Sequence[tuple[str, int]], *, unit: str) -> str:
    """Return columns over labels, the highest one with its number; `unit` names the axis."""
    most, total = max((n for _, n in rows), default=0) or 1, sum(n for _, n in rows) or 1
    step = min(WIDEST, (WIDTH - LEFT - RIGHT) / max(1, len(rows)))
    begin = (WIDTH - step * len(rows)) / 2
    every = -(-len(rows) // LABELS)
    ground = HEIGHT - BOTTOM
    shapes = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{ground}" y2="{ground}"/>']
    for at, (label, number) in enumerate(rows):
        x, high = begin + at * step, (ground - TOP) * number / most
        gap = min(2.0, step / 6)
        told = f"<title>{text(label)}: {number:,} ({number / total:.1%})</title>"
        shapes.append(
            f'<rect class="bar" x="{x + gap:.1f}" width="{max(0.5, step - 2 * gap):.1f}" '
            f'y="{ground - high:.1f}" height="{high:.1f}" rx="{min(2.0, step / 4):.1f}">{told}</rect>'
        )
        if at % every == 0:
            middle = x + step / 2
            shapes.append(f'<text x="{middle:.1f}" y="{ground + 14}" text-anchor="middle">{text(label)}</text>')
    highest = max(range(len(rows)), key=lambda at: rows[at][1], default=None)
    if highest is not None:
        x = min(max(begin + (highest + 0.5) * step, 40), WIDTH - 40)
        shapes.append(f'<text class="value" x="{x:.1f}" y="{TOP - 5}" text-anchor="middle">{rows[highest][1]:,}</text>')
    shapes.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">{text(unit)}</text>')
    return _svg(shapes)


def field(cells: dict[tuple[int, int], int], across: Sequence[str], up: Sequence[str], *, unit: tuple[str, str]) -> str:
    """Return a grid whose cells are the darker the more they count; `unit` names the axes."""
    most = max(cells.values(), default=1)
    left, ground = 58, HEIGHT - BOTTOM
    wide, high = (min(WIDEST, room) for room in ((WIDTH - left - RIGHT) / len(across), (ground - 6) / len(up)))
    shapes = []
    for (x, y), number in sorted(cells.items()):
        told = f"<title>{text(across[x])} x {text(up[y])}: {number:,}</title>"
        shapes.append(
            f'<rect class="bar" x="{left + x * wide:.1f}" y="{ground - (y + 1) * high:.1f}" width="{wide - 1:.1f}" '
            f'height="{high - 1:.1f}" rx="1" fill-opacity="{0.12 + 0.88 * (number / most) ** 0.5:.2f}">{told}</rect>'
        )
    for at in range(0, len(across), -(-len(across) // LABELS)):
        x = left + (at + 0.5) * wide
        shapes.append(f'<text x="{x:.1f}" y="{ground + 14}" text-anchor="middle">{text(across[at])}</text>')
    for at in range(0, len(up), -(-len(up) // LABELS)):
        shapes.append(
            f'<text x="{left - 6}" y="{ground - (at + 0.5) * high + 4:.1f}" text-anchor="end">{text(up[at])}</text>'
        )
    shapes.append(f'<text x="{(left + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{text(unit[0])}</text>')
    turned = f'transform="translate(11 {ground / 2}) rotate(-90)"'
    shapes.append(f'<text {turned} text-anchor="middle">{text(unit[1])}</text>')
    return _svg(shapes)


def _svg(shapes: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}</svg>'
