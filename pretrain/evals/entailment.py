"""Statements about pictures: which of the labels is likeliest (SNLI-VE: Xie et al. 2019, arXiv:1901.06706; NLVR2: Suhr
et al. 2019, arXiv:1811.00491; VCR's and GLUE's labels as well).

Every label is scored as a text, so labels may be of several tokens; with one token each it is the comparison of their
logits at the first step.
"""

from typing import Any

from pydantic import Field

from pretrain.config import ConfigError
from pretrain.data import symbols
from pretrain.data.asked import GIVEN, spelled
from pretrain.data.readers import base as readers
from pretrain.evals import base
from pretrain.metrics import nlvr
from pretrain.metrics.interval import Score
from pretrain.models.constraints import Answers


class Config(base.Config):
    """`evals.entailment`."""

    reader: dict[str, dict[str, Any]] = {"entailment": {}}  # noqa: RUF012  #: one that has labels
    sentence: str | None = None  #: key of the json by which consistency is counted (NLVR2: sentence); none: it is not
    examples: int = Field(default=6, ge=0)  #: statements that the report shows


class Eval(base.Eval):
    """Accuracy over all samples."""

    config: Config
    needs = ("generate",)

    def run(self, features: base.Features) -> dict[str, Score]:
        """Return accuracy and, where a sentence has several pictures, consistency."""
        self.examples = None
        reader = readers.make(self.config.reader)
        if not hasattr(reader.config, "labels"):
            raise ConfigError(
                f"evals.entailment.reader: {next(iter(self.config.reader))} has no labels; take entailment or sentences"
            )
        labels = list(reader.config.labels.values())
        spoken = spelled(labels, self.instruction(), features.transform.size)
        tokens = [features.composer.tokenizer.ids(label) for label in spoken]
        rule = Answers(tokens, end=features.composer.tokenizer.end)
        rows = []
        for batch in self.batches(features, asked=True):
            assert batch.target_B is not None
            guess_B = features.rank(batch, tokens, constraint=rule).argmax(1)
            cards = []
            for name, guess, target, meta in zip(
                base.names(batch), guess_B.tolist(), batch.target_B.tolist(), batch.meta
            ):
                sentence = "" if self.config.sentence is None else str(meta.get(self.config.sentence, ""))
                rows.append((name, sentence, guess == target))
                card = {"given": symbols.plain(meta[GIVEN]), "written": labels[guess], "people": [labels[target]]}
                cards.append({**card, "right": float(guess == target)})
            self.show(batch, cards, count=self.config.examples)
        rows = base.everyone(rows)
        right = [found for _, _, found in rows]
        scores = {"accuracy": nlvr.accuracy(right)}
        if self.config.sentence is not None:
            scores["consistency"] = nlvr.consistency([sentence for _, sentence, _ in rows], right)
        return scores
