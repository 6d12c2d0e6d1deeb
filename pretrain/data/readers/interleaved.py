"""A document of several texts and pictures in their order, one sample a document.

Source: a json member with the texts, and where each picture stands among them; the pictures are members `0.jpg`,
`1.jpg`, ... of the sample, members that the json names, or base64 in the json. Two forms fit as they are:

    {"text_list": ["a", "b"], "image_info": [{"image_name": "0.jpg", "matched_text_index": 1}]}    before text 1
    {"texts": ["a", null, "b"], "images": [null, "0.jpg", null]}                                   in place of a null

Zhu et al. 2023, arXiv:2304.06939 (MMC4); Laurencon et al. 2023, arXiv:2306.16527 (OBELICS). The prefix is empty, the
suffix is the text with one place holder a picture; `images` holds the pictures in the order of their place holders. Of
a document with more than `max_images` pictures a run of texts with at most so many is drawn, another one every epoch.
"""

import base64
import binascii
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.decode import BadSample
from pretrain.data.picture import Picture
from pretrain.data.readers import base


class Config(Section):
    """Where the texts and the pictures lie in a sample."""

    texts: list[fields.Path] = Field(default_factory=lambda: ["json:text_list", "json:texts"])
    pictures: list[fields.Path] = Field(default_factory=lambda: ["json:image_info", "json:images"])
    position: str = "matched_text_index"  #: key of a picture's entry: the text that it stands before
    name: str = "image_name"  #: key of a picture's entry: the extension of its member
    data: str = "image_base64"  #: key of a picture's entry: its bytes, where they are not a member
    placeholder: str = Field(default="<image>", min_length=1)
    separator: str = " "  #: between texts and place holders
    max_images: int = Field(default=8, ge=1)


@dataclass(slots=True)
class _Piece:
    """A text, or a picture that is not decoded yet: a name of a member or bytes."""

    text: str = ""
    picture: str | bytes | None = None


class Reader(base.Reader):
    """Reads a document; pictures outside the drawn run are not decoded."""

    config: Config

    def read(self, record: Record) -> Example:
        config = self.config
        meta = self.meta(record)
        texts, source = fields.first(record, meta, config.texts, "list of texts")
        found, where = fields.first(record, meta, config.pictures, "list of pictures")
        if not isinstance(texts, list) or not isinstance(found, list):
            raise BadSample(f"{source} and {where} are no lists")
        pieces = self._nulls(texts, found, where) if None in texts else self._positions(texts, found, where)
        pieces = self._run(pieces, record.draw)
        words = [config.placeholder if piece.picture is not None else piece.text for piece in pieces]
        return Example(
            record.key,
            [self._picture(record, piece.picture) for piece in pieces if piece.picture is not None],
            suffix=config.separator.join(words),
            meta={name: value for name, value in meta.items() if f"{fields.JSON}{name}" != where},
            draw=record.draw,
            shard=record.shard,
        )

    def _text(self, found: Any) -> _Piece:
        text = fields.text(found, "one of the texts")
        if self.config.placeholder in text:
            raise BadSample(f"one of the texts holds {self.config.placeholder!r}; set another placeholder")
        return _Piece(text)

    def _entry(self, number: int, found: Any, where: str) -> _Piece:
        """Return the picture that an entry of the list stands for."""
        if isinstance(found, dict) and found.get(self.config.data) is not None:
            try:
                return _Piece(picture=base64.b64decode(found[self.config.data], validate=True))
            except (TypeError, ValueError, binascii.Error):
                raise BadSample(f"{where}, picture {number}: {self.config.data} is no base64") from None
        name = found.get(self.config.name) if isinstance(found, dict) else found
        if not isinstance(name, str):
            raise BadSample(f"{where}, picture {number}: names no member and holds no {self.config.data}")
        return _Piece(picture=name.lower())

    def _positions(self, texts: list[Any], found: list[Any], where: str) -> list[_Piece]:
        before: dict[int, list[_Piece]] = {}
        for number, entry in enumerate(found):
            place = entry.get(self.config.position) if isinstance(entry, dict) else None
            if type(place) is not int or not 0 <= place <= len(texts):
                raise BadSample(f"{where}, picture {number}: {self.config.position} is {place!r} of {len(texts)} texts")
            before.setdefault(place, []).append(self._entry(number, entry, where))
        pieces = []
        for place in range(len(texts) + 1):
            pieces += before.get(place, [])
            pieces += [self._text(texts[place])] if place < len(texts) else []
        return pieces

    def _nulls(self, texts: list[Any], found: list[Any], where: str) -> list[_Piece]:
        if len(texts) != len(found) or any((text is None) == (entry is None) for text, entry in zip(texts, found)):
            raise BadSample(f"{where}: expected a picture exactly where the text is null")
        return [
            self._text(text) if entry is None else self._entry(number, entry, where)
            for number, (text, entry) in enumerate(zip(texts, found))
        ]

    def _run(self, pieces: list[_Piece], draw: int) -> list[_Piece]:
        """Return the document, or from a drawn picture on as much of it as `max_images` pictures allow."""
        places = [number for number, piece in enumerate(pieces) if piece.picture is not None]
        if not places:
            raise BadSample("a document without pictures; the reader text takes it")
        spare = len(places) - self.config.max_images
        if spare <= 0:
            return pieces
        first = fields.draw_below(spare + 1, draw, "run")
        begin = 0 if first == 0 else places[first]
        end = places[first + self.config.max_images] if first < spare else len(pieces)
        return pieces[begin:end]

    def _picture(self, record: Record, picture: str | bytes) -> Picture:
        if isinstance(picture, bytes):
            return self.image(replace(record, fields={"base64": picture}), ("base64",))
        if picture not in record.fields:
            raise BadSample(f"no member {picture!r}, which the json names; it has {', '.join(record.fields)}")
        return self.image(record, (picture,))
