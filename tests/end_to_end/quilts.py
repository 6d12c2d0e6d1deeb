"""Thirty-two quilts of four patches: pictures that say all that any task asks of them, with members for every reader.

Each colour lies at one corner alone, the four colours name the quilt, and a patch's colour says how large it is. So
each target is a function of what is given, whatever an epoch draws: the right answer to a question, the words behind a
mask, the codes in a hole. Words are whole tokens: what is learned is the task, not how to spell.
"""

import io
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers, processors

from pretrain.data.format import ShardWriter, write_manifest

COUNT, SIZE, CELL = 32, 32, 16
SHARD, ANSWERS = "quilts-00000.tar", "answers.json"
CORNERS = ("north", "east", "south", "west")
#: the colours that a corner may have, each with its German word
COLOURS: tuple[dict[str, tuple[str, tuple[int, int, int]]], ...] = (
    {"red": ("rot", (220, 40, 40)), "green": ("grün", (40, 160, 60)), "blue": ("blau", (40, 80, 220)),
     "gold": ("golden", (240, 210, 40))},
    {"black": ("schwarz", (10, 10, 10)), "white": ("weiß", (250, 250, 250))},
    {"pink": ("rosa", (250, 90, 190)), "teal": ("türkis", (20, 160, 160))},
    {"lilac": ("lila", (140, 50, 170)), "lime": ("limette", (170, 240, 20))},
)  # fmt: skip
GERMAN = {name: word for corner in COLOURS for name, (word, _) in corner.items()}
NAMES = tuple("".join(letters) for letters in itertools.product("bdfk", "aeiou", "lmnr", "o"))[:COUNT]
LABELS = ("entailment", "neutral", "contradiction")


def colours(index: int) -> tuple[str, ...]:
    """Return the colours of a quilt, corner by corner."""
    return tuple(list(of)[place] for of, place in zip(COLOURS, _places(index)))


def _places(index: int) -> tuple[int, ...]:
    return index % 4, index // 4 % 2, index // 8 % 2, index // 16


def boxes(index: int) -> list[list[float]]:
    """Return x, y, width and height of the patches in pixels, each of which covers half of its cell at least."""
    corners = [(0, 0), (CELL, 0), (0, CELL), (CELL, CELL)]
    inset = [min(place, 2) for place in _places(index)]
    return [[x + n, y + n, CELL - 2 * n, CELL - 2 * n] for (x, y), n in zip(corners, inset)]


def sample(index: int) -> dict[str, bytes]:
    """Return the members of a quilt by extension."""
    words, patches, number = colours(index), boxes(index), (index // 4 + index) % 4
    patch, said, truth = words[number], " ".join(words), LABELS[index % 3]
    wrong = next(name for name in COLOURS[number] if name != patch)
    hypothesis = {"entailment": f"{CORNERS[number]} is {patch}", "contradiction": f"{CORNERS[number]} is {wrong}"}
    meta: dict[str, Any] = {
        "class": index, "name": NAMES[index], "first": words[0], "width": SIZE, "height": SIZE,
        "question": f"what is {CORNERS[number]}?", "answer": patch,
        "corner": CORNERS[number], "colour": patch, "box": patches[number],
        "objects": [{"box": box, "label": name} for box, name in zip(patches, words)],
        "codes": [4 * corner + place for corner, place in enumerate(_places(index))],
        "hypothesis": hypothesis.get(truth, f"{CORNERS[number]} is cheap"), "gold_label": truth,
        "sentence1": f"{NAMES[index]} is {patch}", "sentence2": f"{CORNERS[number]} is {words[0]}",
        "true": index % 2, "named": f"{NAMES[index]} {said} {NAMES[index]}",
        "translation": {"en": said, "de": " ".join(GERMAN[word] for word in words)},
    }  # fmt: skip
    members = {"png": _png(index), "second.png": _png(index ^ 1), "txt": said.encode()}
    features_KC = np.eye(len(GERMAN), dtype=np.float32)[[list(GERMAN).index(word) for word in words]]
    edges_K4 = np.array([[x, y, x + w, y + h] for x, y, w, h in patches], dtype=np.float32) / SIZE
    members |= {"boxes.npy": _npy(edges_K4), "features.npy": _npy(features_KC)}
    return {**members, "json": json.dumps(meta).encode()}


def write(folder: Path) -> Path:
    """Write the shard, and the answers that negatives are drawn from; return the shard."""
    with ShardWriter(folder / SHARD) as writer:
        for index in range(COUNT):
            writer.add(f"{index:02d}", sample(index))
    write_manifest(folder, {SHARD: writer.listed}, {})
    (folder / ANSWERS).write_text(json.dumps({"other": list(GERMAN)}))
    return folder / SHARD


def write_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Write a tokenizer whose tokens are the words and signs of some texts."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    backend = tokenizers.Tokenizer(models.WordLevel({w: n for n, w in enumerate([*specials, *words])}, "<unk>"))
    backend.pre_tokenizer = split
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    backend.add_special_tokens(specials)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def _png(index: int) -> bytes:
    image_HWC = np.full((SIZE, SIZE, 3), 128, dtype=np.uint8)
    for of, name, (x, y, width, height) in zip(COLOURS, colours(index), boxes(index)):
        image_HWC[y : y + height, x : x + width] = of[name][1]
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG")
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
