"""What the model wrote, beside what people said: captions, answers, labels, translations, boxes on their pictures."""

import re
from typing import Any

from pretrain.report import page
from pretrain.report.run import Run

#: evals that leave such examples, in NAME.json
TITLES = {
    "captioning": "Captions", "vqa": "Answers", "entailment": "Statements", "grounding": "Boxes",
    "translation": "Translations",
}  # fmt: skip
IMAGE = re.compile(r"data:image/(webp|png|jpeg);base64,[A-Za-z0-9+/=]+")


def panel(run: Run) -> str:
    """Return the examples that evals have left, one section an eval."""
    out = ""
    for name, title in TITLES.items():
        tree = run.tree(f"{name}.json")
        shown = tree.get("written")
        cards = [_card(one) for one in shown if isinstance(one, dict)] if isinstance(shown, list) else []
        if cards:
            out += page.section(title, page.grid(cards), f"after {tree.get('step', 0):,} steps")
    return out


def _card(one: dict[str, Any]) -> str:
    parts = []
    source = str(one.get("image", ""))
    if IMAGE.fullmatch(source):
        parts.append(_picture(source, one))
    people = one.get("people")
    said = [f"<li>{page.text(text)}</li>" for text in people] if isinstance(people, list) else []
    if "written" in one:
        right = isinstance(one.get("right"), float | int) and one["right"] >= 0.5
        parts.append(f"<p><b{' class=right' * right}>{page.text(one['written'] or '(nothing)')}</b></p>")
    if said:
        parts.append(f"<ul>{''.join(said)}</ul>")
    return page.card(str(one.get("given", "")).strip(), "".join(parts))


def _picture(source: str, one: dict[str, Any]) -> str:
    """Return a picture, with what people meant and what the model found drawn on it."""
    sets = [(kind, one.get(key)) for key, kind in (("people_boxes", "people"), ("boxes", "found"))]
    boxes = [_box(box, kind) for kind, found in sets if isinstance(found, list) for box in found]
    drawn = f'<svg viewBox="0 0 1 1" preserveAspectRatio="none">{"".join(boxes)}</svg>' if boxes else ""
    return f'<figure class="boxed"><img src="{source}" alt="">{drawn}</figure>'


def _box(box: Any, kind: str) -> str:
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(x, float | int) for x in box)):
        return ""
    x0, y0, x1, y1 = (min(1.0, max(0.0, float(x))) for x in box)
    size = f'x="{x0:.4f}" y="{y0:.4f}" width="{max(0.0, x1 - x0):.4f}" height="{max(0.0, y1 - y0):.4f}"'
    return f'<rect class="{kind}" {size}/>'
