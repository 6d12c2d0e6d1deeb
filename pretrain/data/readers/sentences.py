"""One sentence or several, and a label, with or without a picture.

Source: texts in a fixed order and a label: GLUE's pairs (Wang et al. 2018, arXiv:1804.07461), a question with an answer
and a rationale of which is asked whether they are right (VCR, Zellers et al. 2018, arXiv:1811.10830). The prefix is the
texts with a blank between, which stay apart in `meta["texts"]`; the suffix is the label in the words of `labels`, the
target its place there.

    "What is [person 1] doing?" may come in VCR's own form, ["What", "is", [0], "doing", "?"] with the names of the
    objects in the json: a list is a reference to objects, "person" and the symbol `<vis_extra_id_0>`.
"""

from typing import Any

from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.decode import BadSample
from pretrain.data.readers import base
from pretrain.data.symbols import symbol

FIXTURE = {"texts": [["json:hypothesis"]], "label": ["json:gold_label"], "labels": {
    "entailment": "yes", "neutral": "maybe", "contradiction": "no"}}  # fmt: skip


class Config(Section):
    """Where the texts and the label lie in a sample, and what a label is called."""

    image: list[str] | None = None  #: extensions of a picture that is shown with them; none: text only
    texts: list[list[str]] = Field(
        default_factory=lambda: [["json:sentence1", "json:sentence"], ["json:sentence2"]], min_length=1
    )  #: where each text lies, the first that is there
    label: list[fields.Path] = Field(default_factory=lambda: ["json:label"])
    labels: dict[str, str] = Field(default_factory=lambda: {"1": "yes", "0": "no"}, min_length=1)  #: label -> suffix
    objects: fields.Path = "json:objects"  #: names of what references in a text mean
    items: fields.Path | None = None  #: a list of objects that hold these, one drawn an epoch; none: one a sample


class Reader(base.Reader):
    """Reads texts and a label."""

    config: Config

    def read(self, record: Record) -> Example:
        config = self.config
        meta = fields.draw_item(self.meta(record), config.items, record.draw)
        texts = []
        for number, sources in enumerate(config.texts):
            found, source = fields.first(record, meta, sources, f"text {number + 1}")
            what = f"text {number + 1} in {source}"
            referring = isinstance(found, list)
            texts.append(self._spelled(record, meta, found, what) if referring else fields.text(found, what))
        found, source = fields.first(record, meta, config.label, "label")
        names = list(config.labels)
        name = str(found).lower() if isinstance(found, bool) else str(found)
        if name not in names:
            raise BadSample(f"{source} is {found!r}, expected one of {', '.join(names)}")
        return Example(
            record.key,
            self.pictures(record, config.image),
            prefix=" ".join(texts),
            suffix=config.labels[name],
            target=names.index(name),
            meta={**meta, "texts": texts},
            draw=record.draw,
            shard=record.shard,
        )

    def _spelled(self, record: Record, meta: dict[str, Any], found: list[Any], what: str) -> str:
        names = fields.lookup(record, meta, self.config.objects)
        words = []
        for one in found:
            if isinstance(one, str):
                words.append(fields.text(one, what))
                continue
            if not (isinstance(one, list) and isinstance(names, list) and all(_within(n, names) for n in one)):
                raise BadSample(f"{what}: {one!r} refers to no object of {self.config.objects}")
            marks = [f"{fields.text(names[n], 'name of an object')} {symbol(f'<vis_extra_id_{n}>')}" for n in one]
            words.append(" and ".join(marks))
        if not words:
            raise BadSample(f"{what} is empty")
        return " ".join(words)


def _within(number: Any, names: list[Any]) -> bool:
    return type(number) is int and 0 <= number < len(names)
