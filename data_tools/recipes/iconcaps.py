"""IconCaps: 1,949 named and tagged emoji drawn by seven hands, about 45 MB of shards in a minute.

Source: npm packages. Names and keywords: emojibase-data (MIT). Pictures: @iconify-json/twemoji (CC-BY-4.0),
@iconify-json/emojione (CC-BY-4.0), @iconify-json/fxemoji (Apache-2.0), @iconify-json/fluent-emoji-flat (MIT),
@lobehub/fluent-emoji-3d (MIT), @iconify-json/noto and @iconify-json/noto-v1 (Apache-2.0).

Two things are held out: the hand of noto (test) with its older set noto-v1 (validation), and a tenth of the
concepts, chosen by the hash of their hexcode, out of every training style ("unseen"). Flags are left out: they look
the same in every style, so they would teach and prove nothing. The few-shot shards sort the test style into
emojibase's subgroups; the shift shards are the same concepts, cut in the same way, as the validation style draws them.

    python -m data_tools build --recipe iconcaps --out data/iconcaps
"""

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from data_tools import _npm, _progress
from data_tools._arguments import positive
from data_tools._cache import cache_folder
from data_tools._folder import claim
from data_tools.recipes import _sheet
from data_tools.recipes._draw import OVERSAMPLE, render_all
from data_tools.recipes._emoji import NAMES, STYLES, Concept, Style, read_concepts, read_drawings
from pretrain.data import format as shards

TEMPLATES = (
    "{}",
    "an icon of {}",
    "a picture of {}",
    "an emoji of {}",
    "a drawing of {}",
    "{} icon",
    "a small image of {}",
)
TAGGED, ALONE = 6, 5  # sentences with keywords, and of keywords alone
LEAST_MEMBERS = 20  # a subgroup with fewer pictures is no few-shot class
PLAIN = {"food-prepared": "cooked or prepared food", "face-concerned": "concerned faces", "person": "people"}

Drawings = Mapping[str, Mapping[str, str | bytes]]  #: style -> hexcode -> SVG text or bytes of a bitmap


class Sample(NamedTuple):
    """One record before its pixels are read."""

    key: str
    style: str
    hexcode: str
    caption: str
    record: dict[str, Any]


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Add the recipe's own options."""
    parser.add_argument("--size", type=positive, default=64, help="pixels a side (default 64)")
    parser.add_argument("--cache", type=Path, default=None, help="where downloads are kept (default: the user's cache)")
    parser.add_argument("--vocab-size", type=positive, default=4096, help="tokens of the BPE (default 4096)")
    parser.add_argument("--shard-size", type=positive, default=512, help="samples a shard (default 512)")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes that draw")


def build(args: argparse.Namespace) -> int:
    """Fetch, draw, split and write; what is there already is kept."""
    cache = args.cache or cache_folder()
    paths = _npm.fetch([NAMES, *(style.package for style in STYLES)], cache)
    concepts = read_concepts(paths[NAMES])
    drawings = {style.name: read_drawings(style, paths[style.package], concepts) for style in STYLES}
    classes = scored_classes(concepts, drawings)
    plan = {**main_splits(concepts, drawings, classes), **few_shot_splits(concepts, drawings)}
    mark = _fingerprint(args, plan, drawings)
    if is_complete(args.out, mark):
        print(f"{args.out} is complete and up to date")
        return 0
    pictures = _pictures(drawings, cache / "rendered", size=args.size, workers=args.workers)
    with claim(args.out):
        counts = _write_shards(args.out, plan, pictures, shard_size=args.shard_size)
        _write_extras(args.out, plan, classes)
        _write_tokenizer(args.out / "tokenizer", plan["train"], vocab_size=args.vocab_size)
        _sheet.write(args.out / "contact_sheet.png", concepts, pictures, size=args.size)
        # last: it vouches for all the rest
        shards.write_manifest(args.out, counts, _meta(args, plan, classes, pictures, mark))
    for split, samples in plan.items():
        print(f"{split:<20}{len(samples):>6} samples")
    print(f"{args.out}: {len(counts)} shards, {sum(size for _, size, _ in counts.values()) / 1e6:.0f} MB")
    return 0


def captions(concept: Concept) -> list[str]:
    """Return the sentences that may stand under a picture of a concept; the first is its plain name.

    A reader draws one of them an epoch, so their numbers are weights: about half name the concept in a template,
    nearly half add keywords, the rest are keywords alone, which is how words get to pictures of unseen concepts.
    """
    tags = [tag for tag in concept.tags if tag != concept.label]
    starts = range(0, len(tags), -(-len(tags) // TAGGED) or 1)
    windows = [tags[at : at + 1 + number % 3] for number, at in enumerate(starts)]  # of one, two and three keywords
    named = [template.format(concept.label) for template in TEMPLATES]
    tagged = [", ".join([text, *window]) for text, window in zip(named, windows)]
    alone = [template.format(", ".join(window)) for template, window in zip(TEMPLATES, windows[1:][:ALONE])]
    return list(dict.fromkeys([*named, *tagged, *alone]))


def scored_classes(concepts: Sequence[Concept], drawings: Drawings) -> dict[str, dict[str, str]]:
    """Return {hexcode: entry of classes.json}: what the test style draws, less flags and what nobody could learn."""
    tested = {hexcode for style in STYLES if style.role == "test" for hexcode in drawings[style.name]}
    taught = {hexcode for style in STYLES if style.role == "train" for hexcode in drawings[style.name]}
    return {
        c.hexcode: {"name": c.label, "group": "unseen" if c.is_unseen else "seen", "hexcode": c.hexcode}
        for c in concepts
        if c.hexcode in tested and not c.is_flag and (c.is_unseen or c.hexcode in taught)
    }


def main_splits(concepts: Sequence[Concept], drawings: Drawings, classes: Mapping[str, Any]) -> dict[str, list[Sample]]:
    """Return the samples of train, validation and test, each in an order that mixes styles and subjects."""
    number = {hexcode: at for at, hexcode in enumerate(classes)}
    splits: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    for style in STYLES:
        for concept in concepts:
            fits = not concept.is_unseen and not concept.is_flag if style.role == "train" else concept.hexcode in number
            if fits and concept.hexcode in drawings[style.name]:
                extra = {"class": number[concept.hexcode]} if concept.hexcode in number else {}
                splits[style.role].append(_sample(style, concept, prefix="", extra=extra))
    return {name: _shuffled(samples) for name, samples in splits.items()}


def few_shot_splits(concepts: Sequence[Concept], drawings: Drawings) -> dict[str, list[Sample]]:
    """Return the test style by subgroup, cut 60/20/20 by the hash of the hexcode inside each subgroup.

    What the validation style draws of the same concepts is cut alike: the same classes under a shift of style.
    """
    hands = {"fewshot": _hand("test"), "shift": _hand("validation")}
    members: dict[str, list[Concept]] = {}
    for concept in concepts:
        if concept.hexcode in drawings[hands["fewshot"].name] and concept.subgroup_key and concept.group != "flags":
            members.setdefault(concept.subgroup_key, []).append(concept)
    large = [group for group in members.values() if len(group) >= LEAST_MEMBERS]
    splits: dict[str, list[Sample]] = {f"{to}-{part}": [] for to in hands for part in ("train", "validation", "test")}
    for number, group in enumerate(large):
        extra = {"class": number, "name": plain_name(group[0])}
        for rank, concept in enumerate(sorted(group, key=lambda c: _hash(c.hexcode))):
            share = rank / len(group)
            part = "train" if share < 0.6 else "validation" if share < 0.8 else "test"
            for to, style in hands.items():
                if concept.hexcode in drawings[style.name]:
                    splits[f"{to}-{part}"].append(_sample(style, concept, prefix=f"{to}-", extra=extra))
    return {name: _shuffled(samples) for name, samples in splits.items()}


def _hand(role: str) -> Style:
    return next(style for style in STYLES if style.role == role)


def plain_name(concept: Concept) -> str:
    """Return the name of a concept's subgroup as one would say it."""
    words = PLAIN.get(concept.subgroup_key, concept.subgroup)
    return words.replace(" & ", " and ").replace(" / ", " or ")


def is_complete(folder: Path, mark: str) -> bool:
    """Return whether the folder holds exactly what this call would write."""
    manifest = shards.read_manifest(folder)
    if manifest["meta"].get("fingerprint") != mark:
        return False
    try:
        return all(
            len(shards.read_index(folder / name)) == row["samples"] and (folder / name).stat().st_size == row["bytes"]
            for name, row in manifest["shards"].items()
        )
    except (OSError, shards.ShardError):
        return False


def _sample(style: Style, concept: Concept, *, prefix: str, extra: Mapping[str, Any]) -> Sample:
    sentences = captions(concept)
    record = {
        "captions": sentences,
        "label": concept.label,
        "tags": list(concept.tags),
        "hexcode": concept.hexcode,
        "style": style.name,
        "group": concept.group,
        "subgroup": concept.subgroup,
        "seen": not concept.is_unseen,
        **extra,
    }
    return Sample(f"{prefix}{style.name}-{concept.hexcode.lower()}", style.name, concept.hexcode, sentences[0], record)


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _shuffled(samples: Iterable[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: _hash(sample.key))


def _fingerprint(args: argparse.Namespace, plan: Mapping[str, list[Sample]], drawings: Drawings) -> str:
    """Return a hash of all that decides about the output; a change of captions or pins changes it."""
    parts = [repr((args.size, args.vocab_size, args.shard_size, OVERSAMPLE))]
    parts += [json.dumps([name, samples]) for name, samples in plan.items()]
    parts += [_digest(drawing) for drawing in drawings.values()]
    return _hash("\n".join(parts))


def _digest(drawings: Mapping[str, str | bytes]) -> str:
    total = sha256()
    for hexcode, drawing in drawings.items():
        total.update(hexcode.encode() + b"\0" + (drawing.encode() if isinstance(drawing, str) else drawing) + b"\0")
    return total.hexdigest()


def _pictures(
    drawings: Mapping[str, Mapping[str, str | bytes]], folder: Path, *, size: int, workers: int
) -> dict[str, dict[str, bytes]]:
    """Return {style: {hexcode: PNG}}; each style is kept once drawn, under the hash of what was drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    with _progress.bar(sum(map(len, drawings.values())), doing="draw", unit="picture") as bar:
        for style, sources in drawings.items():
            path = folder / f"{style}-{size}px-{_hash(f'{OVERSAMPLE} {_digest(sources)}')[:16]}.tar"
            if not _is_readable(path):
                with shards.ShardWriter(path) as writer:
                    for hexcode, data in render_all(sources, size=size, workers=workers):
                        writer.add(hexcode, {"png": data})
                        bar.update()
            with open(path, "rb") as file:
                entries = shards.read_index(path)
                pictures[style] = {entry.key: shards.read_members(file, entry)["png"] for entry in entries}
            bar.update(sum(map(len, pictures.values())) - bar.n)
    return pictures


def _is_readable(path: Path) -> bool:
    try:
        return bool(shards.read_index(path))
    except (OSError, shards.ShardError):
        return False


def _write_shards(
    out: Path,
    plan: Mapping[str, list[Sample]],
    pictures: Mapping[str, Mapping[str, bytes]],
    *,
    shard_size: int,
) -> dict[str, shards.Listed]:
    """Write all shards, remove those that an earlier build left, and return what dataset.json says of them."""
    stale = set(shards.read_manifest(out)["shards"])
    (out / shards.MANIFEST).unlink(missing_ok=True)
    counts = {}
    for split, samples in plan.items():
        parts = -(-len(samples) // shard_size)
        for number in range(parts):  # of equal size, so that no lane gets a short one
            path = out / f"{split}-{number:05d}.tar"
            with shards.ShardWriter(path) as writer:
                for sample in samples[len(samples) * number // parts : len(samples) * (number + 1) // parts]:
                    writer.add(sample.key, _members(sample, pictures))
            counts[path.name] = writer.listed
    for name in stale - set(counts):
        (out / Path(name).name).unlink(missing_ok=True)
        shards.index_path(out / Path(name).name).unlink(missing_ok=True)
    return counts


def _write_extras(out: Path, plan: Mapping[str, list[Sample]], classes: Mapping[str, Mapping[str, str]]) -> None:
    """Write the names of the classes, and whose pictures these are."""
    _json(out / "classes.json", list(classes.values()))
    named = {sample.record["class"]: sample.record["name"] for sample in plan["fewshot-train"]}
    _json(out / "fewshot-classes.json", [{"name": named[number]} for number in sorted(named)])
    (out / "LICENSES.md").write_text(licences(), encoding="utf-8")


def _members(sample: Sample, pictures: Mapping[str, Mapping[str, bytes]]) -> dict[str, bytes]:
    return {
        "png": pictures[sample.style][sample.hexcode],
        "txt": sample.caption.encode(),
        "json": json.dumps(sample.record, ensure_ascii=False).encode(),
    }


def _write_tokenizer(folder: Path, samples: Sequence[Sample], *, vocab_size: int) -> None:
    """Train the BPE on every training sentence once: how many styles draw a concept says nothing about words."""
    from pretrain.data import tokenizer  # imported late: slow, and only a build needs it

    texts = dict.fromkeys(text for sample in samples for text in sample.record["captions"])
    tokenizer.train(sorted(texts), vocab_size=vocab_size).save(folder)


def _meta(
    args: argparse.Namespace,
    plan: Mapping[str, list[Sample]],
    classes: Mapping[str, Mapping[str, str]],
    pictures: Mapping[str, Mapping[str, bytes]],
    mark: str,
) -> dict[str, Any]:
    groups = [row["group"] for row in classes.values()]
    return {
        "recipe": "iconcaps",
        "size": args.size,
        "styles": {
            style.name: {
                "package": f"{style.package.name}@{style.package.version}",
                "role": style.role,
                "licence": style.licence,
                "pictures": len(pictures[style.name]),
            }
            for style in STYLES
        },
        "names": f"{NAMES.name}@{NAMES.version}",
        "samples": {split: len(samples) for split, samples in plan.items()},
        "classes": {group: groups.count(group) for group in ("seen", "unseen")},
        "fingerprint": mark,
    }


def licences() -> str:
    """Return the text of LICENSES.md: whose pictures these are and what they ask for."""
    lines = [
        "# Licences of the pictures and names in this data set",
        "",
        "The pictures were drawn by the people below, turned into small bitmaps on white, and not changed otherwise.",
        "CC-BY-4.0 asks you to name the author when you show or share them.",
        "",
        "| style | package | author | licence |",
        "|---|---|---|---|",
    ]
    for style in STYLES:
        package = f"{style.package.name} {style.package.version}"
        lines.append(f"| {style.name} | {package} | {style.author} | {style.licence} |")
    lines.append(f"| names and keywords | {NAMES.name} {NAMES.version} | Miles Johnson | MIT |")
    return "\n".join(lines) + "\n"


def _json(path: Path, tree: Any) -> None:
    shards.write_atomic(path, json.dumps(tree, indent=1, ensure_ascii=False).encode() + b"\n")
