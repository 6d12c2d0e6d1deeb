"""A made-up data set: coloured shapes and sentences that say what they are. Equal arguments write equal bytes."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pretrain.data.format import ShardWriter, write_manifest

COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 210, 40),
    "purple": (140, 50, 170), "orange": (245, 140, 30), "black": (20, 20, 20), "pink": (250, 150, 190),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
GERMAN = {
    "red": "Rot", "green": "Grün", "blue": "Blau", "yellow": "Gelb",
    "purple": "Lila", "orange": "Orange", "black": "Schwarz", "pink": "Rosa",
    "circle": "Kreis", "square": "Quadrat", "triangle": "Dreieck", "cross": "Kreuz", "ring": "Ring", "bar": "Balken",
}  # fmt: skip
CLASSES = tuple(f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES))


Box = tuple[float, float, float, float]


def write(folder: str | Path, *, shards: int = 2, samples: int = 64, size: int = 32, seed: int = 0) -> list[Path]:
    """Write `shards` tars of `samples` samples each (png, txt, json) with indexes and dataset.json; return the tars.

    Pictures are `size` pixels wide. The json member holds `class` (a number in CLASSES), `label`, two `captions`, and
    what the other readers want: a question with answers, the shape's box, a hypothesis, two languages, a document.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths, counts = [], {}
    for number in range(shards):
        path = folder / f"shapes-{number:05d}.tar"
        with ShardWriter(path) as writer:
            for member in range(samples):
                index = number * samples + member
                writer.add(f"{index:08d}", sample(index, size=size, seed=seed))
        paths.append(path)
        counts[path.name] = writer.listed
    write_manifest(folder, counts, {"source": "synthetic", "seed": seed, "classes": list(CLASSES)})
    return paths


def sample(index: int, *, size: int, seed: int) -> dict[str, bytes]:
    """Return the members of one sample by extension."""
    rng = np.random.Generator(np.random.Philox(key=(seed << 64) + index))
    target = index % len(CLASSES)
    label = CLASSES[target]
    captions = [f"a {label}", f"a picture of one {label} on a plain ground"]
    picture, box = _scene(label, size=size, rng=rng)
    meta = {"class": target, "label": label, "captions": captions, **_tasks(index, label)}
    meta |= {"width": size, "height": size, "box": [round(value, 2) for value in box]}
    members = {"png": _png(picture), "txt": captions[index % 2].encode()}
    return {**members, "json": json.dumps(meta).encode()}


def _tasks(index: int, label: str) -> dict[str, Any]:
    """Return what tasks other than captioning ask of a picture of `label`; each is a fact that the picture shows."""
    colour, shape = label.split(" ")
    other = next(name for name in COLOURS if name != colour)
    truth = ("entailment", "neutral", "contradiction")[index % 3]
    said = {"entailment": f"this {shape} is {colour}", "neutral": f"the {colour} {shape} is cheap"}
    return {
        "question": f"what colour is the {shape}?",
        "answers": [colour] * 8 + ["light " + colour, other],
        "expression": f"the {colour} {shape}",
        "codes": [index % 7, len(shape), len(colour), 3],
        "hypothesis": said.get(truth, f"this {shape} is {other}"),
        "gold_label": truth,
        "translation": {"en": f"a {label}", "de": f"ein {GERMAN[shape]} in {GERMAN[colour]}"},
        "text_list": [f"here comes a {shape}.", f"it is {colour}."],
        "image_info": [{"image_name": "png", "matched_text_index": index % 3}],
    }


def draw(label: str, *, size: int, rng: np.random.Generator) -> Image.Image:
    """Return a picture of e.g. "red circle" at a random place and scale."""
    return _scene(label, size=size, rng=rng)[0]


def _scene(label: str, *, size: int, rng: np.random.Generator) -> tuple[Image.Image, Box]:
    """Return the picture, and the shape's x, y, width and height."""
    name, shape = label.split(" ")
    ground = tuple(int(200 + 55 * rng.random()) for _ in range(3))
    image = Image.new("RGB", (size, size), ground)
    side = size * (0.45 + 0.35 * rng.random())
    x, y = (float((size - side) * rng.random()) for _ in range(2))
    _shape(ImageDraw.Draw(image), shape, (x, y, x + side, y + side), COLOURS[name])
    return image, ((x, y + side / 3, side, side / 3) if shape == "bar" else (x, y, side, side))


def _shape(pen: ImageDraw.ImageDraw, shape: str, box: Box, fill: tuple[int, ...]) -> None:
    x0, y0, x1, y1 = box
    third, middle = (x1 - x0) / 3, (y0 + y1) / 2
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(1, int(third / 2)))
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(x0, y1), (x1, y1), ((x0 + x1) / 2, y0)], fill=fill)
    if shape in ("cross", "bar"):
        pen.rectangle((x0, middle - third / 2, x1, middle + third / 2), fill=fill)
    if shape == "cross":
        pen.rectangle((x0 + third, y0, x1 - third, y1), fill=fill)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
