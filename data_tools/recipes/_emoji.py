"""The emoji of npm packages: concepts with names and keywords, and the drawings that each style has of them.

Everything is read from the tarballs in memory; no member name ever reaches the file system.
"""

import json
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from data_tools._npm import Package
from pretrain.data.format import ShardError

NAMES = Package("emojibase-data", "17.0.0")
#: quotes as CLIP's cleaning writes them; transformers' processor does not clean, so captions must be clean already
STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
UNSEEN = 0.1  # this share of the concepts is held out of every training style


class Style(NamedTuple):
    """One hand that draws: where its pictures come from, what they serve for, whose they are."""

    name: str
    package: Package
    role: str  #: train, validation or test
    licence: str
    author: str


def _iconify(name: str, version: str) -> Package:
    return Package(f"@iconify-json/{name}", version)


STYLES = (
    Style("twemoji", _iconify("twemoji", "1.2.5"), "train", "CC-BY-4.0", "Twitter, Inc and other contributors"),
    Style("emojione", _iconify("emojione", "1.2.3"), "train", "CC-BY-4.0", "EmojiOne"),
    Style("fxemoji", _iconify("fxemoji", "1.2.2"), "train", "Apache-2.0", "Mozilla"),
    Style("fluent-emoji-flat", _iconify("fluent-emoji-flat", "1.2.6"), "train", "MIT", "Microsoft Corporation"),
    Style("fluent-emoji-3d", Package("@lobehub/fluent-emoji-3d", "1.1.0"), "train", "MIT", "Microsoft Corporation"),
    Style("noto-v1", _iconify("noto-v1", "1.2.5"), "validation", "Apache-2.0", "Google Inc"),
    Style("noto", _iconify("noto", "1.2.9"), "test", "Apache-2.0", "Google Inc"),
)


class Concept(NamedTuple):
    """One emoji without skin tone: what it is called and where it belongs."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    subgroup_key: str

    @property
    def is_flag(self) -> bool:
        """Flags look alike in all styles: neither trained on nor scored."""
        return self.label.startswith("flag:")

    @property
    def is_unseen(self) -> bool:
        """Whether the concept is held out of every training style, by hash: the same on every machine."""
        return int(sha256(self.hexcode.encode()).hexdigest(), 16) / 2**256 < UNSEEN


def read_concepts(path: Path) -> list[Concept]:
    """Return the concepts of an emojibase-data tarball in its own order."""
    with tarfile.open(path, "r:gz") as tar:
        data, messages = (_json(tar, f"package/en/{name}.json") for name in ("data", "messages"))
    groups = {row["order"]: row["message"] for row in messages["groups"]}
    subgroups = {row["order"]: (row["message"], row["key"]) for row in messages["subgroups"]}
    concepts = []
    for row in data:
        subgroup, key = subgroups.get(row.get("subgroup"), ("", ""))
        tags = tuple(tag.translate(STRAIGHT) for tag in row.get("tags", ()))
        label = row["label"].translate(STRAIGHT)
        concepts.append(Concept(row["hexcode"], label, tags, groups.get(row.get("group"), ""), subgroup, key))
    return concepts


def read_drawings(style: Style, path: Path, concepts: Sequence[Concept]) -> dict[str, str | bytes]:
    """Return {hexcode: SVG text or bytes of a bitmap} of the concepts that a style draws; no drawing serves two."""
    if not style.package.name.startswith("@iconify-json/"):
        return _bitmaps(path, concepts)
    with tarfile.open(path, "r:gz") as tar:
        icons, chars = _json(tar, "package/icons.json"), _json(tar, "package/chars.json")
    return {hexcode: _svg(icons, name) for hexcode, name in match(icons, chars, concepts).items()}


def match(icons: dict[str, Any], chars: dict[str, str], concepts: Sequence[Concept]) -> dict[str, str]:
    """Return {hexcode: icon name}: by code point first, then by ever looser forms of the label.

    Loose forms only see icons that no stricter form has claimed, so "cat" never takes "cat-face" from "cat face".
    """
    by_code = {_code(code): name for code, name in chars.items()}
    found: dict[str, str] = {}
    free = set(icons["icons"])
    ways: list[Callable[[Concept], Sequence[str]]] = [
        lambda concept: [_resolve(icons, by_code.get(_code(concept.hexcode), ""))],
        lambda concept: slugs(concept.label),
        lambda concept: [_resolve(icons, slug) for slug in slugs(concept.label)],
        lambda concept: [_resolve(icons, slug.replace("flag-", "flag-for-", 1)) for slug in slugs(concept.label)],
        lambda concept: [slug.replace("regional-indicator-", "letter-", 1) for slug in slugs(concept.label)],
        lambda concept: [f"{slug}-face" for slug in slugs(concept.label)],
        lambda concept: [slug.replace("-", "") for slug in slugs(concept.label)],
    ]
    for way in ways:
        for concept in concepts:
            if concept.hexcode in found:
                continue
            name = next((name for name in way(concept) if name in free), None)
            if name is not None:
                found[concept.hexcode] = name
                free.remove(name)
    return found


def slugs(label: str) -> list[str]:
    """Return the icon names that a label may have: "woman's hat" is womans-hat here and woman-s-hat there."""
    forms = []
    for text in (re.sub(r"['\u2019]", "", label.replace("&", "and")), label):
        plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
        forms.append(re.sub(r"[^a-z0-9]+", "-", plain).strip("-"))
    return list(dict.fromkeys(forms))


def _code(hexcode: str) -> str:
    """Return a code point sequence without the variation selector, which packages keep or drop at will."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _resolve(icons: dict[str, Any], name: str) -> str:
    aliases = icons.get("aliases", {})
    for _ in range(5):  # an alias may name an alias, and a broken file a circle
        if name in icons["icons"] or set(aliases.get(name, ())) != {"parent"}:  # not those that also flip or turn
            break
        name = aliases[name]["parent"]
    return name


def _svg(icons: dict[str, Any], name: str) -> str:
    """Return an icon as a document; a box that is not square is centred in one, so nothing is stretched."""
    icon = icons["icons"][name]
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def _bitmaps(path: Path, concepts: Sequence[Concept]) -> dict[str, str | bytes]:
    wanted = {_code(concept.hexcode): concept.hexcode for concept in concepts}
    found: dict[str, str | bytes] = {}
    with tarfile.open(path, "r:gz") as tar:
        for code, member in _webp(tar):
            file = tar.extractfile(member)
            if code in wanted and file is not None:
                found[wanted[code]] = file.read()
    return found


def _webp(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    for member in tar:
        stem, _, extension = member.name.rpartition("/")[2].partition(".")
        if extension == "webp":
            yield _code(stem), member


def _json(tar: tarfile.TarFile, name: str) -> Any:
    try:
        file = tar.extractfile(name)
        return json.loads(file.read()) if file else {}
    except (KeyError, ValueError) as error:
        raise ShardError(f"{tar.name!r}: no readable {name} in it ({error}); delete the file and run again") from error
