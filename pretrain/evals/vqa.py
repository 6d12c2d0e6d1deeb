"""Visual question answering: the share of people who would agree with what the model answers.

Answers are written freely; or one of a list is written, word by word (`answers`); or the likeliest of the list is taken
(`rank`: Wang et al. 2022, arXiv:2202.03052; with `likeliest: 128` and `among_answers: false` as Li et al. 2021,
arXiv:2107.07651). Both compare answers by their log-probabilities, whatever their lengths, unless `write` names a
length_penalty. Soft accuracy where the json holds what people said, else the answer's weight: metrics/vqa.py.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.data import symbols
from pretrain.data.asked import GIVEN, read_answers, spelled
from pretrain.evals import base
from pretrain.metrics import vqa
from pretrain.metrics.interval import Score
from pretrain.models.constraints import Answers
from pretrain.models.writing import Options, refuse_rules


class Config(base.Config):
    """`evals.vqa`."""

    reader: dict[str, dict[str, Any]] = {"vqa": {"choose": "heaviest"}}  # noqa: RUF012
    how: Literal["free", "answers", "rank"] = "free"  #: write anything, write one of `answers`, or rank them all
    answers: list[str] | str = []  # noqa: RUF012  #: what may be answered: a list, or a file with one a line
    write: Options = Options(beams=5, max_tokens=10)
    chunk: int = Field(default=20, ge=1)  #: rank: answers of a question that are scored together
    likeliest: int | None = Field(default=None, ge=1)  #: rank: only those with the likeliest first token; none: all
    among_answers: bool = True  #: rank: probabilities among what the answers allow; false: among all words
    people: str = "answers"  #: key of the json that lists what people said
    examples: int = Field(default=6, ge=0)  #: questions that the report shows

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if (self.how == "free") == bool(self.answers):
            raise ValueError("answers: a list or a file for how: answers and how: rank, nothing for how: free")
        if self.how != "rank" and (self.likeliest is not None or not self.among_answers):
            raise ValueError("likeliest and among_answers are for how: rank")
        if self.how == "answers":
            refuse_rules(self.write)
            # OFA's beams are not normalised
            if self.write.beams > 1 and "length_penalty" not in self.write.model_fields_set:
                self.write = self.write.model_copy(update={"length_penalty": 0.0})
        return self


class Eval(base.Eval):
    """Accuracy over all questions."""

    config: Config
    needs = ("generate",)

    def run(self, features: base.Features) -> dict[str, Score]:
        """Return accuracy."""
        self.examples = None
        listed: list[str] = []
        if self.config.how != "free":
            listed = read_answers(self.config.answers, "evals.vqa.answers")
        tokens = [
            features.composer.tokenizer.ids(one) for one in spelled(listed, self.instruction(), features.transform.size)
        ]
        rule = Answers(tokens, end=features.composer.tokenizer.end) if tokens else None
        rows = []
        for batch in self.batches(features, asked=True):
            answers = self._answers(features, batch, listed, tokens, rule)
            if not all("answer_scores" in meta for meta in batch.meta):
                raise ConfigError(f"evals.vqa.reader: {next(iter(self.config.reader))} gives no answers; take vqa")
            cards = []
            for name, answer, meta in zip(base.names(batch), answers, batch.meta):
                right = agreement(answer, meta.get(self.config.people), meta["answer_scores"])
                rows.append((name, right))
                people = sorted(meta["answer_scores"], key=meta["answer_scores"].get, reverse=True)
                given = symbols.plain(meta[GIVEN])
                cards.append({"given": given, "written": answer, "people": people[:5], "right": right})
            self.show(batch, cards, count=self.config.examples)
        return {"accuracy": vqa.accuracy([right for _, right in base.everyone(rows)])}

    def _answers(
        self, features: base.Features, batch: Batch, listed: list[str], tokens: list[list[int]], rule: Answers | None
    ) -> list[str]:
        config = self.config
        if config.how != "rank":
            return [features.text(kept[0]) for kept in features.write(batch, config.write, constraint=rule)]
        among = rule if config.among_answers else None
        score_BA = features.rank(batch, tokens, constraint=among, chunk=config.chunk, likeliest=config.likeliest)
        return [listed[number] for number in score_BA.argmax(1).tolist()]


def agreement(answer: str, people: Any, weights: dict[str, float]) -> float:
    """Return soft accuracy where several people were asked, else the answer's weight."""
    if isinstance(people, list) and len(people) > 1:
        return vqa.soft_accuracy(answer, [str(one["answer"] if isinstance(one, dict) else one) for one in people])
    return vqa.weight(answer, weights)
