"""A picture, a sentence about it, and whether the one implies the other (visual entailment).

Source: an image, a hypothesis, optionally the premise in words, and a label: SNLI-VE (Xie et al. 2019,
arXiv:1901.06706), or any set of labels, such as true and false about two pictures (`second`; NLVR2, Suhr et al. 2018,
arXiv:1811.00491). The prefix is the hypothesis, behind the premise where one is asked for; the suffix is the label in
the words of `labels`, the target its place there.
"""

import re
from typing import Any

from pydantic import Field, model_validator

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.decode import IMAGES, BadSample
from pretrain.data.readers import base

PREMISE = "{premise}"


class Config(Section):
    """Where the picture, the texts and the label lie in a sample, and what a label is called."""

    image: list[str] = Field(default_factory=lambda: list(IMAGES))  #: extensions, the first that is there
    second: list[str] | None = None  #: extensions of a second picture, shown behind the first; none: there is one
    hypothesis: list[str] = Field(
        default_factory=lambda: ["json:hypothesis", "json:sentence2", "json:sentence", "hypothesis.txt", "txt"]
    )
    premise: list[str] = Field(default_factory=list)  #: e.g. json:premise; an empty list: the picture alone
    label: list[fields.Path] = Field(default_factory=lambda: ["json:gold_label", "json:label"])
    labels: dict[str, str] = Field(
        default_factory=lambda: {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}
    )  #: label -> suffix; a number is the place in this list
    items: fields.Path | None = None  #: a list of objects that hold these, one drawn an epoch; none: one a sample
    prompt: str | None = None  #: the prefix, with a hole {} for the hypothesis and {premise} where there is one

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.prompt is not None and (self.prompt.count("{}"), self.prompt.count(PREMISE)) != (1, bool(self.premise)):
            raise ValueError("prompt: needs one hole {}, and one hole {premise} exactly where premise is given")
        if not self.labels:
            raise ValueError("labels: needs at least one label")
        return self


class Reader(base.Reader):
    """Reads an image, a hypothesis and a label."""

    config: Config

    def read(self, record: Record) -> Example:
        config = self.config
        meta = fields.draw_item(self.meta(record), config.items, record.draw)
        found, source = fields.first(record, meta, config.hypothesis, "hypothesis")
        holes = {"{}": fields.text(found, f"hypothesis in {source}")}
        if config.premise:
            found, source = fields.first(record, meta, config.premise, "premise")
            holes[PREMISE] = fields.draw_text(found, f"premise in {source}", record.draw, "premise")
        prompt = config.prompt or (f"{PREMISE} {{}}" if config.premise else "{}")
        found, source = fields.first(record, meta, config.label, "label")
        target = self._target(found, source)
        return Example(
            record.key,
            [self.image(record, tuple(config.image)), *self.pictures(record, config.second)],
            prefix=re.sub(r"\{premise\}|\{\}", lambda hole: holes[hole.group()], prompt),
            suffix=list(config.labels.values())[target],
            target=target,
            meta={**meta, "texts": [holes[name] for name in (PREMISE, "{}") if name in holes]},
            draw=record.draw,
            shard=record.shard,
        )

    def _target(self, found: Any, source: str) -> int:
        names = list(self.config.labels)
        name = str(found).lower() if isinstance(found, bool) else found  # NLVR2 writes true and false either way
        if isinstance(name, str) and name in names:
            return names.index(name)
        if type(name) is int and 0 <= name < len(names):
            return name
        raise BadSample(f"{source} is {found!r}, expected one of {', '.join(names)}")
