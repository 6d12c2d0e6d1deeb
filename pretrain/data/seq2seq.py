"""Examples to rows for an encoder-decoder: the prefix is its source, the suffix what its decoder writes.

The source is the prefix between the tokenizer's specials. The decoder reads its opening (model.opening: BART `<s>`, T5
its padding, VL-BART `</s> <s>`) and then what it says, which is the rest of the opening, the suffix and the end token:
labels are what it reads, one place earlier. A text that is too long keeps its end token.

Letters: B = rows, N = images, T = tokens of the source, U = places of the decoder.
"""

from dataclasses import dataclass, field
from typing import cast

import torch

from pretrain.batch import Batch, Example
from pretrain.config import ConfigError
from pretrain.data.compose import CHARACTERS, IGNORE, Composer, Row, padded
from pretrain.data.decode import BadSample, Pixels
from pretrain.data.tokenizer import Tokenizer


@dataclass(slots=True)
class PairRow(Row):
    """A row whose decoder writes something."""

    decoder: list[int] = field(default_factory=list)  #: what it reads
    decoder_labels: list[int] = field(default_factory=list)  #: what it says at each of these places, or IGNORE
    weight: float = 1.0
    codes: bool = False
    hole: bool = False


class Seq2SeqComposer(Composer):
    """Puts the text of examples together for an encoder-decoder."""

    def __init__(self, tokenizer: Tokenizer, *, context_length: int, written: int, opening: tuple[int, ...]) -> None:
        """`context_length` tokens are read at most, `written` places of the decoder filled.

        Raises:
            ConfigError: a length without room for the specials.
        """
        super().__init__(tokenizer, context_length=context_length)
        if written <= len(opening):
            raise ConfigError(f"model: a decoder of {written} places has no room for its start and a word")
        self.written, self.opening = written, opening

    def row(self, example: Example, images: list[Pixels]) -> PairRow:
        """Return an example as a row; the prefix is given, the suffix and the end token are learned."""
        source = self.tokenizer.ids(example.prefix[: CHARACTERS * self.context_length])
        said = self.tokenizer.ids(example.suffix[: CHARACTERS * self.written])
        room = self.written - len(self.opening)
        if example.codes and len(said) > room:
            raise BadSample(f"{len(said)} image codes are more than the {room} that the model's decoder writes")
        said = [*self.opening, *said[:room], *([] if self.tokenizer.end is None else [self.tokenizer.end])]
        labels = said[1:]
        first = len(self.opening) - 1
        labels[first : first + example.unlearned] = [IGNORE] * len(labels[first : first + example.unlearned])
        ids = self.tokenizer.wrap(source, self.context_length)
        return self._row(
            PairRow,
            example,
            images,
            ids=ids,
            blocks=[0] * len(ids),
            labels=[IGNORE] * len(ids),
            decoder=said[:-1],
            decoder_labels=labels,
            weight=example.weight,
            codes=example.codes,
            hole=example.hole,
        )

    def collate(self, rows: list[Row]) -> Batch:
        """Return rows as a Batch; each of its two texts is as long as its longest row."""
        batch = super().collate(rows)
        pairs = cast(list[PairRow], rows)
        places = max(len(row.decoder) for row in pairs)
        batch.decoder_tokens_BU = padded([row.decoder for row in pairs], places, self.tokenizer.pad)
        batch.decoder_labels_BU = padded([row.decoder_labels for row in pairs], places, IGNORE)
        batch.codes_B = torch.tensor([row.codes for row in pairs])
        batch.weight_B = torch.tensor([row.weight for row in pairs], dtype=torch.float32)
        if any(row.hole for row in pairs):
            batch.hole_N = torch.tensor([row.hole for row in pairs for _ in row.images])
        return batch
