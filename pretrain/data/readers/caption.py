"""A picture and a sentence about it: the pairs of contrastive pretraining."""

from typing import Any

from pydantic import Field, field_validator

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data.decode import IMAGES, BadSample, decode_text
from pretrain.data.readers import base
from pretrain.dist import hash64


class Config(Section):
    """Where the picture, the caption and its group lie in a sample."""

    image: list[str] = Field(default_factory=lambda: list(IMAGES))  #: extensions, the first that is there
    text: list[str] = Field(default_factory=lambda: ["txt", "json:captions", "json:caption"])  #: likewise; json:KEY
    templates: list[str] = Field(default_factory=list)  #: sentences with a hole {}, one drawn a sample; none: as it is
    keep_all: bool = False  #: put all captions of a sample in its meta, as "captions", for who needs more than one
    group: str | None = None  #: json:KEY whose equal values make captions equal; none: equal caption texts

    @field_validator("group")
    @classmethod
    def _json(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("json:"):
            raise ValueError("write it as json:KEY")
        return value

    @field_validator("templates")
    @classmethod
    def _hole(cls, value: list[str]) -> list[str]:
        if any(template.count("{}") != 1 for template in value):
            raise ValueError("each template needs one hole {}")
        return value


class Reader(base.Reader):
    """Reads an image member and a caption; a list of captions gives one of them, drawn per epoch and sample."""

    config: Config

    def read(self, record: Record) -> Example:
        meta = self.meta(record)
        found, source = self._found(record, meta)
        template = "{}"
        if self.config.templates:
            template = self.config.templates[hash64(record.draw, "template") % len(self.config.templates)]
        caption = template.replace("{}", _pick(found, source, record.draw))
        group = "" if self.config.group is None else str(_member(meta, self.config.group))
        if self.config.keep_all:
            meta = {**meta, "captions": [template.replace("{}", text) for text in _all(found, source)]}
        image_HWC = self.image(record, tuple(self.config.image))
        return Example(
            record.key, [image_HWC], suffix=caption, group=group, meta=meta, draw=record.draw, shard=record.shard
        )

    def _found(self, record: Record, meta: dict[str, Any]) -> tuple[Any, str]:
        """Return what the first source that is there holds, and which one it is."""
        for source in self.config.text:
            if source.startswith("json:"):
                found = meta.get(source.removeprefix("json:"))
            else:
                found = decode_text(record.fields[source], name=source) if source in record.fields else None
            if found is not None:
                return found, source
        raise BadSample(f"no caption: none of {', '.join(self.config.text)}; it has {', '.join(record.fields)}")


def _pick(found: Any, source: str, draw: int) -> str:
    if isinstance(found, list) and found:
        found = found[hash64(draw, "caption") % len(found)]
    if not isinstance(found, str):
        raise BadSample(f"caption in {source} is a {type(found).__name__}, expected text or a list of texts")
    if not found.strip():
        raise BadSample(f"caption in {source} is empty")
    return found.strip()


def _all(found: Any, source: str) -> list[str]:
    """Return each caption once, in order, without those that are blank."""
    if not isinstance(found, list):
        found = [found]
    for text in found:
        if not isinstance(text, str):
            raise BadSample(f"caption in {source} is a {type(text).__name__}, expected text or a list of texts")
    return list(dict.fromkeys(text.strip() for text in found if text.strip()))


def _member(meta: dict[str, Any], where: str) -> Any:
    name = where.removeprefix("json:")
    if name not in meta:
        raise BadSample(f"json has no {name!r}, which data.reader.caption.group asks for")
    return meta[name]
