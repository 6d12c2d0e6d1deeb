"""Captions and answers that do not belong to a picture, for image-text matching.

Captions come from a file, or from another sample of the data set, whose picture must be another one (drawn again until
it is; Cho et al. 2021, arXiv:2102.02779). With a list of objects, 0.4 of the captions that name one get another in its
place; with lists of answers by type, a sure answer gets another of its type (Wang et al. 2022, arXiv:2202.03052).
"""

import json
from pathlib import Path
from typing import Any

from pretrain.batch import Example, Record
from pretrain.config import ConfigError, Section
from pretrain.data import fields
from pretrain.data.decode import BadSample
from pretrain.data.instructions.base import Others, draw_one, draw_share, lines
from pretrain.dist import hash64

TRIES = 100
SWAP = 0.4  # so often a named object is swapped
COUNTED = "how many"  # the type whose answers are numbers
OTHER = "other"  # the type of answers that have none


class Config(Section):
    """Where negatives come from."""

    captions: str | None = None  #: a file of captions, one a line; none: those of other samples of the data set
    objects: str | None = None  #: a file of names of objects, one a line; none: none are swapped
    answers: str | None = None  #: a json file of lists of answers by type, one of them "other"; none: no such negatives
    image: fields.Path | None = None  #: json:KEY that is equal where the picture is the same; none: the sample's key


class Negatives:
    """Draws negatives of an example."""

    def __init__(self, config: Config, others: Others | None, *, where: str) -> None:
        """`where` is the config's name in messages.

        Raises:
            ConfigError: a file that cannot be used, or captions of other samples where there are no others.
        """
        self.config, self.others, self.where = config, others, where
        self.captions = lines(config.captions, f"{where}.captions") if config.captions else []
        self.objects = lines(config.objects, f"{where}.objects") if config.objects else []
        self.answers = _answers(config.answers, f"{where}.answers") if config.answers else {}
        self.types = {answer: kind for kind, answers in self.answers.items() for answer in answers}

    def check_captions(self) -> None:
        """Raise a ConfigError where there are no captions to draw from."""
        if not self.captions and self.others is None:
            raise ConfigError(
                f"{self.where}.captions: only local shards in exact order give other samples; name a file"
            )

    def check_answers(self) -> None:
        """Raise a ConfigError where there are no answers to draw from."""
        if not self.answers:
            raise ConfigError(f"{self.where}.answers: name a json file of answers by type, for answers that are wrong")

    def caption(self, example: Example, caption: str) -> str:
        """Return a caption that is not the example's.

        Raises:
            BadSample: all that were drawn were its own.
        """
        named = [name for name in _names(example.meta) if name in caption]
        if self.objects and named and draw_share(example.draw, "swap") < SWAP:
            name = draw_one(named, example.draw, "swapped")
            if rest := [one for one in self.objects if one != name]:
                return caption.replace(name, draw_one(rest, example.draw, "object"))
        return self._other(example, caption)

    def _other(self, example: Example, caption: str) -> str:
        own = {_bare(one) for one in (caption, *example.meta.get("captions", ())) if isinstance(one, str)}
        for number in range(TRIES):
            draw = hash64(example.draw, "negative", number)
            found = draw_one(self.captions, draw, "caption") if self.captions else self._of_another(example, draw)
            if found and _bare(found) not in own:
                return found
        raise BadSample(f"no caption of another picture in {TRIES} draws")

    def _of_another(self, example: Example, draw: int) -> str:
        assert self.others is not None, "checked when it was made"
        try:
            other = self.others(draw)
        except BadSample:
            return ""
        return "" if self._picture(other) == self._picture(example) else other.suffix

    def _picture(self, example: Example) -> Any:
        where = self.config.image
        found = None if where is None else fields.lookup(Record("", "", {}), example.meta, where)
        return (example.shard, example.key) if found is None else found

    def answer(self, example: Example, answer: str, sure: float) -> str:
        """Return an answer that is not the right one: of its type where it is sure to be right, else of none."""
        place = draw_share(example.draw, "wrong")
        kind = self.types.get(answer)
        if kind is None or sure <= place + 0.1:
            kind = OTHER
        elif kind == COUNTED and answer.isdecimal() and place > 0.5:
            number = int(answer)
            return str(number + draw_one((-1, 1), example.draw, "step") if number else 1)
        rest = [one for one in self.answers[kind] if one != answer]
        if not rest:
            raise BadSample(f"{self.where}.answers: {kind!r} has no answer but {answer!r}")
        return draw_one(rest, example.draw, "answer negative")


def _bare(text: str) -> str:
    return " ".join(text.lower().split())


def _names(meta: dict[str, Any]) -> list[str]:
    """Return the names of objects that a json member or the reader lists."""
    found = meta.get("names", meta.get("objects", ()))
    return [one for one in found if isinstance(one, str) and one] if isinstance(found, list) else []


def _answers(file: str, where: str) -> dict[str, list[str]]:
    try:
        tree = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {file} cannot be read as json ({error})") from None

    def listed(one: Any) -> bool:
        return isinstance(one, list) and len(one) > 0 and all(isinstance(x, str) and "\0" not in x for x in one)

    if not isinstance(tree, dict) or OTHER not in tree or not all(map(listed, tree.values())):
        raise ConfigError(f'{where}: {file} must map types to lists of answers, one of the types "{OTHER}"')
    return tree
