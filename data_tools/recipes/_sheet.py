"""A picture of the data: rows of concepts, a column for each style, for people who would rather look."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_tools.recipes._emoji import STYLES, Concept
from pretrain.data.format import write_atomic

ROWS = 14
LABEL = 190  # pixels for the name at the left
HEAD = 40
GAP = 8


def write(path: Path, concepts: Sequence[Concept], pictures: Mapping[str, Mapping[str, bytes]], *, size: int) -> None:
    """Write a PNG of concepts that most styles draw, spread evenly over all subjects, two of them unseen."""
    rows = _chosen(concepts, pictures)
    step = size + GAP
    sheet = Image.new("RGB", (LABEL + max(step, 100) * len(STYLES), HEAD + step * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, style in enumerate(STYLES):
        left = LABEL + column * max(step, 100)
        draw.text((left, 6), f"{style.name}\n({style.role})", fill="black", font=font)
        for row, concept in enumerate(rows):
            data = pictures[style.name].get(concept.hexcode)
            if data is not None:
                with Image.open(io.BytesIO(data)) as image:
                    sheet.paste(image, (left, HEAD + row * step))
    for row, concept in enumerate(rows):
        note = "\n(unseen: held out of training)" if concept.is_unseen else ""
        draw.text((6, HEAD + row * step + size // 3), concept.label[:28] + note, fill="black", font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    write_atomic(path, out.getvalue())


def _chosen(concepts: Sequence[Concept], pictures: Mapping[str, Mapping[str, bytes]]) -> list[Concept]:
    def hands(concept: Concept) -> int:
        return sum(concept.hexcode in style for style in pictures.values())

    most = max((hands(concept) for concept in concepts), default=0)
    drawn = [concept for concept in concepts if hands(concept) == most]
    unseen = [concept for concept in drawn if concept.is_unseen]
    seen = [concept for concept in drawn if not concept.is_unseen]
    return [*_spread(seen, ROWS - 2), *_spread(unseen, 2)]


def _spread(concepts: Sequence[Concept], number: int) -> list[Concept]:
    number = min(number, len(concepts))
    return [concepts[(2 * at + 1) * len(concepts) // (2 * number)] for at in range(number)]
