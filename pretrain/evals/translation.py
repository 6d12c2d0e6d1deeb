"""Translation: sacrebleu's BLEU of what a model writes (Post 2018, arXiv:1804.08771)."""

from typing import Any

from pydantic import Field, model_validator

from pretrain import dist
from pretrain.evals import base
from pretrain.metrics import translation
from pretrain.metrics.interval import Score
from pretrain.models.writing import Options


class Config(base.Config):
    """`evals.translation`."""

    reader: dict[str, dict[str, Any]] = {"translate": {}}  # noqa: RUF012
    write: Options = Options(beams=5, max_tokens=40)
    lowercase: bool = False  #: compare in lower case, as the recipe of Multi30K does
    examples: int = Field(default=6, ge=0)  #: sentences that the report shows

    @model_validator(mode="after")
    def _found(self) -> "Config":
        translation.refuse_without_sacrebleu()
        return self


class Eval(base.Eval):
    """BLEU over all sentences."""

    config: Config
    needs = ("generate",)

    def run(self, features: base.Features) -> dict[str, Score]:
        """Return BLEU."""
        self.examples = None
        rows = self.written(features, lambda meta: [base.said(meta)])
        texts = ([text for _, text, _ in rows], [people for _, _, people in rows])
        found = translation.bleu(*texts, lowercase=self.config.lowercase) if dist.is_main() else None
        return {"BLEU": dist.broadcast_object(found)}
