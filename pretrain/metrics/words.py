"""Captions to words: `simple`, or `ptb`, which numbers of papers are made of; and METEOR, which needs Java as well.

`ptb` is Stanford's PTBTokenizer as pycocoevalcap calls it, lower-cased, without punctuation. Texts are split by one
Java process for all of them.
"""

import importlib.util
import re
import shutil
from collections.abc import Sequence
from typing import Literal

from pretrain.config import ConfigError
from pretrain.metrics.interval import Score, mean

Kind = Literal["simple", "ptb"]
_WORD = re.compile(r"\w+(?:'\w+)*")


def split(texts: Sequence[str], kind: Kind) -> list[list[str]]:
    """Return the words of each text.

    Raises:
        ConfigError: `ptb` without pycocoevalcap or Java.
    """
    if kind == "simple":
        return [_WORD.findall(text.lower().replace("\u2019", "'")) for text in texts]
    refuse_without_java("words: ptb")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = {number: [{"caption": " ".join(text.split())}] for number, text in enumerate(texts)}
    found = PTBTokenizer().tokenize(lines)
    return [found[number][0].split() for number in range(len(texts))]


def meteor(written: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Score:
    """Return METEOR 1.5 (Denkowski and Lavie 2014) by pycocoevalcap's Java process.

    The score is that of the whole corpus, which is not quite the mean of its texts' scores; the interval is that
    mean's, moved to it.

    Raises:
        ConfigError: pycocoevalcap or Java is missing.
    """
    refuse_without_java("meteor: true")
    from pycocoevalcap.meteor.meteor import Meteor

    given = {n: [" ".join(words) for words in several] for n, several in enumerate(references)}
    said = {n: [" ".join(words)] for n, words in enumerate(written)}
    whole, texts = Meteor().compute_score(given, said)
    found = mean(texts, unit="points")
    return found._replace(value=whole, low=found.low + whole - found.value, high=found.high + whole - found.value)


def refuse_without_java(what: str) -> None:
    """Raise a ConfigError where pycocoevalcap or Java is missing."""
    if importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        raise ConfigError(f"{what} needs pycocoevalcap and Java: pip install diptych[caption], and a `java` on PATH")
