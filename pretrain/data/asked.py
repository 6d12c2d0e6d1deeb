"""Examples as questions: the composer for who lets a model write, which shows it what is given and nothing of the rest.

What the sample says itself (the suffix, the box) lies in the row's meta, for scores; a decoder's row ends where the
model begins to write.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pretrain.batch import Batch, Example
from pretrain.config import ConfigError
from pretrain.data.compose import IGNORE, Composer, Row
from pretrain.data.decode import BadSample, Pixels
from pretrain.data.instructions.base import Instruction, lines
from pretrain.data.seq2seq import Seq2SeqComposer

#: keys of meta: the text that is given and the one that the sample has (symbols as they are laid), its first box
GIVEN, SAID, BOX = "given text", "said text", "said box"


class Asked(Composer):
    """Another composer's rows without what the sample says."""

    def __init__(self, composer: Composer) -> None:
        self.inner = composer
        self.tokenizer, self.context_length = composer.tokenizer, composer.context_length

    def row(self, example: Example, images: list[Pixels]) -> Row:
        """Return the row of what is given."""
        box_4 = None if example.boxes_K4 is None else example.boxes_K4[0].tolist()
        meta = {**example.meta, GIVEN: example.prefix, SAID: example.suffix, BOX: box_4}
        row = self.inner.row(replace(example, suffix="", candidates=(), codes_alone=False, meta=meta), images)
        if not isinstance(self.inner, Seq2SeqComposer):
            row.labels[-1] = row.ids[-1]  # a text that fills all places was cut: its end is not given either
        return row

    def collate(self, rows: list[Row]) -> Batch:
        """Return rows as a Batch."""
        return self.inner.collate(rows)

    def prompts(self, batch: Batch) -> list[list[int]] | None:
        """Return what each row's decoder reads after its opening; None: there is no decoder beside the model."""
        if not isinstance(self.inner, Seq2SeqComposer):
            return None
        opening = len(self.inner.opening)
        return [given[opening:] for given in self._given(batch)]

    def room(self, batch: Batch) -> list[int]:
        """Return how many tokens the model can write in each row, by the places that it has."""
        if isinstance(self.inner, Seq2SeqComposer):
            return [self.inner.written + self.inner.beyond - len(given) for given in self._given(batch)]
        assert batch.valid_BT is not None and batch.labels_BT is not None
        given_B = (batch.valid_BT & (batch.labels_BT == IGNORE)).sum(1)
        return (self.context_length + self.inner.beyond - given_B).tolist()

    def _given(self, batch: Batch) -> list[list[int]]:
        """Return what each row's decoder reads: up to where it would say its end."""
        assert batch.decoder_tokens_BU is not None and batch.decoder_labels_BU is not None
        rows = zip(batch.decoder_tokens_BU.tolist(), (batch.decoder_labels_BU != IGNORE).tolist())
        return [tokens[: len(says) - says[::-1].index(True)] for tokens, says in rows]


def read_answers(answers: list[str] | str, where: str) -> list[str]:
    """Return a list of answers, or the lines of a file, without repetitions.

    Raises:
        ConfigError: no such file, or none.
    """
    found = lines(answers, where) if isinstance(answers, str) else answers
    if not found:
        raise ConfigError(f"{where}: name at least one answer, or a file with one a line")
    return list(dict.fromkeys(found))


def spelled(answers: Sequence[str], instruction: Instruction | None, side: int) -> list[str]:
    """Return answers as the instruction spells what is learned, e.g. lower-cased behind a blank.

    Raises:
        ConfigError: its task has no answers.
    """
    if instruction is None:
        return list(answers)
    out = []
    for answer in answers:
        meta: dict[str, Any] = {"answer_scores": {answer: 1.0}}
        try:
            out.append(instruction.lay(Example("", [], prefix="?", suffix=answer, meta=meta), side).suffix)
        except BadSample as error:
            raise ConfigError(f"instruction: its task has no answers to choose from ({error})") from None
    return out
