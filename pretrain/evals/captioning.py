"""Captioning: what a model writes about pictures, against what people wrote: CIDEr-D, BLEU, ROUGE-L, METEOR.

Chen et al. 2015 (arXiv:1504.00325). All captions of a sample are its references. The names of the scores say how words
were split; numbers of papers are those of `words: ptb`.
"""

from typing import Any

from pydantic import Field, model_validator

from pretrain import dist
from pretrain.evals import base
from pretrain.metrics import caption
from pretrain.metrics import words as wording
from pretrain.metrics.interval import Score
from pretrain.models.writing import Options


class Config(base.Config):
    """`evals.captioning`."""

    #: keep_all: all captions are references; lists of them come first
    reader: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "caption": {"keep_all": True, "text": ["json:captions", "json:caption", "txt"]}
    }
    write: Options = Options(beams=5)
    words: wording.Kind = "simple"  #: ptb: as papers have it, which needs pycocoevalcap and Java
    meteor: bool = False  #: needs both as well
    examples: int = Field(default=6, ge=0)  #: pictures that the report shows

    @model_validator(mode="after")
    def _java(self) -> "Config":
        for asked, what in ((self.words == "ptb", "words: ptb"), (self.meteor, "meteor: true")):
            if asked:
                wording.refuse_without_java(what)
        return self


class Eval(base.Eval):
    """Scores over all pictures, which every rank gets from rank 0."""

    config: Config
    needs = ("generate",)

    def run(self, features: base.Features) -> dict[str, Score]:
        """Return WORDS/CIDEr-D, WORDS/BLEU-1 to 4, WORDS/ROUGE-L and, where it is asked for, WORDS/METEOR."""
        self.examples = None
        rows = self.written(features, lambda meta: meta.get("captions") or [base.said(meta)])
        return dict(dist.broadcast_object(self._scores(rows) if dist.is_main() else None))

    def _scores(self, rows: list[tuple[Any, str, list[str]]]) -> dict[str, Score]:
        flat = wording.split([text for _, one, people in rows for text in (one, *people)], self.config.words)
        source = iter(flat)
        written, references = [], []
        for _, _, people in rows:
            written.append(next(source))
            references.append([next(source) for _ in people])
        found = caption.scores(written, references)
        if self.config.meteor:
            found["METEOR"] = wording.meteor(written, references)
        return {f"{self.config.words}/{name}": score for name, score in found.items()}
