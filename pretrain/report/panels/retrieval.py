"""Retrieval by example: the best pictures for a caption and the best captions for a picture, green where right."""

import re

from pretrain.report import page
from pretrain.report.run import Run

FILE = "retrieval.json"
IMAGE = re.compile(r"data:image/(webp|png|jpeg);base64,[A-Za-z0-9+/=]+")


def panel(run: Run) -> str:
    """Return the examples that the retrieval eval has left."""
    tree = run.tree(FILE)
    cards = [_found_pictures(e) for e in tree.get("text_to_image", [])]
    cards += [_found_captions(e) for e in tree.get("image_to_text", [])]
    note = f"after {tree.get('step', 0):,} steps"
    return page.section("Retrieval", page.grid(cards), note) if cards else ""


def _found_pictures(example: dict) -> str:
    figures = [_picture(found["image"], right=found["right"]) for found in example["found"]]
    return page.card(example["caption"], f'<div class="row">{"".join(figures)}</div>')


def _found_captions(example: dict) -> str:
    items = [f"<li{' class=right' * bool(f['right'])}>{page.text(f['caption'])}</li>" for f in example["found"]]
    return page.card(
        example["caption"], f'<div class="row">{_picture(example["image"])}<ol>{"".join(items)}</ol></div>'
    )


def _picture(source: str, *, right: bool = False) -> str:
    shown = source if IMAGE.fullmatch(source) else ""
    return f'<figure{" class=right" * bool(right)}><img src="{shown}" alt=""></figure>'
