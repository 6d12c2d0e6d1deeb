"""What a sample must be like to stay: rules about the image's header and about words, each with a name and a count.

A rule says whether a sample breaks it. Captions are asked one by one: training may draw any of them.
"""

import argparse
import re
from collections.abc import Callable
from typing import NamedTuple

from data_tools._tar import Picture

FILE_NAME = re.compile(r"^\s*\S*\.(jpe?g|png|gif|webp|bmp|tiff?|svg|pdf|heic)\s*$", re.I)
CAMERA = re.compile(r"^\s*(img|dsc|dscn|dscf|pict?|image|photo|mvc|screenshot)[\s_-]*\d[\d\s_-]*(\.\w{2,4})?\s*$", re.I)
ADDRESS = re.compile(r"(https?://|www\.)\S+|\S+@\S+\.\w+|\b\S+\.(com|net|org|html?|php)\b", re.I)
SHARE = 0.5  # of a caption that may be digits and signs, or an address, or one and the same word


class Options(NamedTuple):
    """The limits that a command was given; None: none."""

    min_side: int | None = None
    max_side: int | None = None
    max_aspect: float | None = None
    min_words: int | None = None
    max_words: int | None = None
    caption_matches: str | None = None
    caption_lacks: str | None = None
    min_ascii: float | None = None
    no_noise: bool = False


def options_of(args: argparse.Namespace) -> Options:
    """Return the limits in parsed arguments."""
    return Options(**{name: getattr(args, name) for name in Options._fields})


def picture_rules(options: Options) -> dict[str, Callable[[Picture], bool]]:
    """Return the rules about pictures by name; each returns True for one to drop."""
    found: dict[str, Callable[[Picture], bool]] = {}
    if (least := options.min_side) is not None:
        found["min-side"] = lambda picture: min(picture.width, picture.height) < least
    if (most := options.max_side) is not None:
        found["max-side"] = lambda picture: max(picture.width, picture.height) > most
    if (aspect := options.max_aspect) is not None:
        found["max-aspect"] = lambda picture: (
            max(picture.width, picture.height) > aspect * min(picture.width, picture.height)
        )
    return found


def caption_rules(options: Options) -> dict[str, Callable[[str], bool]]:
    """Return the rules about captions by name; each returns True for one to drop."""
    found: dict[str, Callable[[str], bool]] = {}
    if (least := options.min_words) is not None:
        found["min-words"] = lambda caption: len(caption.split()) < least
    if (most := options.max_words) is not None:
        found["max-words"] = lambda caption: len(caption.split()) > most
    if options.caption_matches is not None:
        wanted = re.compile(options.caption_matches)
        found["caption-matches"] = lambda caption: wanted.search(caption) is None
    if options.caption_lacks is not None:
        unwanted = re.compile(options.caption_lacks)
        found["caption-lacks"] = lambda caption: unwanted.search(caption) is not None
    if (share := options.min_ascii) is not None:
        found["min-ascii"] = lambda caption: sum(letter < "\x80" for letter in caption) < share * len(caption)
    if options.no_noise:
        found["no-noise"] = is_noise
    return found


def is_noise(caption: str) -> bool:
    """Return whether a caption is no description in any language: a file name, an address, signs, one word repeated."""
    bare = "".join(caption.split())
    if FILE_NAME.match(caption) or CAMERA.match(caption) or not bare:
        return True
    if sum(len(found.group()) for found in ADDRESS.finditer(caption)) > SHARE * len(bare):
        return True
    if sum(letter.isalpha() for letter in bare) <= SHARE * len(bare) and not _marks(bare):
        return True
    words = caption.casefold().split()
    return len(words) >= 4 and max(map(words.count, set(words))) > SHARE * len(words)


def _marks(bare: str) -> bool:
    """Return whether a text is of a script whose vowels are marks, not letters, as in Hindi or Thai."""
    return sum(letter.isalpha() or not (letter.isascii() or letter.isalnum()) for letter in bare) > 0.8 * len(bare)
