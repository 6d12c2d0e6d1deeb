"""Examples to rows for an encoder-decoder: the prefix is its source, the suffix what its decoder writes.

The source is the prefix between the tokenizer's specials. The decoder reads its opening (model.opening: BART `<s>`, T5
its padding, VL-BART `</s> <s>`) and then what it says, which is the rest of the opening, the suffix and the end token:
labels are what it reads, one place earlier. A text that is too long keeps its end token. Where an example says so, the
decoder reads the source before the suffix, which carries no loss (OFA's prompts, Wang et al. 2022, arXiv:2202.03052).

Where the suffix is one of a list of candidates, only their next tokens are allowed at each of its places; where it is
of codes alone, only codes and the tokenizer's specials (OFA's text-to-image).

Letters: B = rows, N = images, T = tokens of the source, U = places of the decoder, S = sets of tokens, V = vocabulary.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, takewhile
from typing import cast

import torch
from torch import Tensor

from pretrain.batch import Batch, Example
from pretrain.config import ConfigError
from pretrain.data.compose import CHARACTERS, IGNORE, Composer, Row, padded
from pretrain.data.decode import BadSample, Pixels
from pretrain.data.symbols import pieces
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.trie import Trie


@dataclass(slots=True)
class PairRow(Row):
    """A row whose decoder writes something."""

    decoder: list[int] = field(default_factory=list)  #: what it reads
    decoder_labels: list[int] = field(default_factory=list)  #: what it says at each of these places, or IGNORE
    weight: float = 1.0
    codes: bool = False
    hole: bool = False
    allowed: list[tuple[int, ...]] = field(default_factory=list)  #: what may stand at the last of these places


class Seq2SeqComposer(Composer):
    """Puts the text of examples together for an encoder-decoder."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        written: int,
        opening: tuple[int, ...],
        pictures: tuple[int, str] | None = None,
        regions: bool = False,
        picture_codes: int | None = None,
    ) -> None:
        """`context_length` tokens are read at most, `written` places of the decoder filled; the rest as in Composer.

        `picture_codes`: those of a picture that the model writes; None: any number.

        Raises:
            ConfigError: a length without room for the specials.
        """
        super().__init__(tokenizer, context_length=context_length, pictures=pictures, regions=regions)
        if written <= len(opening):
            raise ConfigError(f"model: a decoder of {written} places has no room for its start and a word")
        self.written, self.opening, self.picture_codes = written, opening, picture_codes
        self._tries: dict[int, tuple[tuple[str, ...], Trie]] = {}

    def row(self, example: Example, images: list[Pixels]) -> PairRow:
        """Return an example as a row; the prefix is given, the suffix and the end token are learned."""
        source = self.tokenizer.ids(example.prefix[: CHARACTERS * self.context_length])
        ids = self.tokenizer.wrap(source, self.context_length)
        said = self.tokenizer.ids(example.suffix[: CHARACTERS * self.written])
        if example.codes and example.suffix:  # in a question nothing is said
            self._refuse_other_codes(example.suffix)
        given = [*self.opening, *self._prompt(example, ids)]
        room = self.written - len(given)
        if example.codes and len(said) > room:
            raise BadSample(f"{len(said)} image codes are more than the {room} that the model's decoder writes")
        if room < 1 and len(given) > len(self.opening):
            raise BadSample(f"the decoder's prompt of {len(given)} tokens leaves none of its {self.written} places")
        end = [] if self.tokenizer.end is None else [self.tokenizer.end]
        said = [*said[:room], *end]
        silent = 0 if len(given) == len(self.opening) else len(given) - 1  # a prompt is not learned, nor its opening
        labels = [IGNORE] * silent + given[1 + silent :]
        unlearned = min(example.unlearned, len(said))
        allowed = self._allowed(example.candidates, said[: len(said) - len(end)])
        if example.codes_alone:
            allowed = [self._codes] * len(said)
        return self._row(
            PairRow,
            example,
            images,
            ids=ids,
            blocks=[0] * len(ids),
            labels=[IGNORE] * len(ids),
            decoder=[*given, *said[:-1]],
            decoder_labels=[*labels, *[IGNORE] * unlearned, *said[unlearned:]],
            allowed=allowed,
            weight=example.weight,
            codes=example.codes,
            hole=example.hole,
        )

    def _refuse_other_codes(self, text: str) -> None:
        """Raise a BadSample where a picture's codes are none of the model's (they would be spelled), or not as many."""
        codes = [piece for piece, laid in pieces(text) if laid]
        unknown = next((code for code in codes if self.tokenizer.symbol(code) is None), None)
        if unknown is not None:
            raise BadSample(f"{unknown} is no code of the model: its codebook has fewer (model.codes) than the data's")
        if self.picture_codes not in (None, len(codes)):
            raise BadSample(
                f"{len(codes)} image codes, the model writes {self.picture_codes} of a picture (model.code_image_size):"
                " in another raster each would stand elsewhere"
            )

    def _prompt(self, example: Example, ids: list[int]) -> list[int]:
        """Return what the decoder reads of the source before the suffix: all but its start, with or without its end."""
        if example.prompt == "none":
            return []
        assert example.prompt in ("source", "source_end"), example.prompt
        begin = self.tokenizer.start is not None
        stop = len(ids) - (example.prompt == "source" and self.tokenizer.end is not None)
        return ids[begin:stop]

    def _allowed(self, candidates: tuple[str, ...], said: list[int]) -> list[tuple[int, ...]]:
        """Return the tokens that may stand at each place of what is said and behind it; nothing without candidates."""
        if not candidates:
            return []
        if id(candidates) not in self._tries:
            sequences = [self.tokenizer.ids(one) for one in candidates]
            self._tries[id(candidates)] = (candidates, Trie(sequences, end=self.tokenizer.end or 0))  # keeps the id
        trie = self._tries[id(candidates)][1]
        if said not in trie:
            raise BadSample("the answer is longer than the model's decoder writes")
        return [tuple(trie.next(said[:place])) for place in range(len(said) + 1)]

    @cached_property
    def _codes(self) -> tuple[int, ...]:
        """The tokenizer's specials and all codes."""
        specials = (self.tokenizer.start, self.tokenizer.pad, self.tokenizer.end)
        codes = takewhile(
            lambda code: code is not None, (self.tokenizer.symbol(f"<code_{number}>") for number in count())
        )
        return tuple({one for one in (*specials, *codes) if one is not None})

    def collate(self, rows: list[Row]) -> Batch:
        """Return rows as a Batch; each of its two texts is as long as its longest row."""
        batch = super().collate(rows)
        pairs = cast(list[PairRow], rows)
        places = max(len(row.decoder) for row in pairs)
        batch.decoder_tokens_BU = padded([row.decoder for row in pairs], places, self.tokenizer.pad)
        batch.decoder_labels_BU = padded([row.decoder_labels for row in pairs], places, IGNORE)
        batch.codes_B = torch.tensor([row.codes for row in pairs])
        batch.weight_B = torch.tensor([row.weight for row in pairs], dtype=torch.float32)
        if any(row.allowed for row in pairs):
            batch.allowed_BU, batch.allowed_SV = self._sets(pairs, places)
        if any(row.hole for row in pairs):
            batch.hole_N = torch.tensor([row.hole for row in pairs for _ in row.images])
        return batch

    def _sets(self, rows: list[PairRow], places: int) -> tuple[Tensor, Tensor]:
        """Return the number of each place's set [B, U] and the sets as bool [S, V]; number 0 is that of all tokens."""
        numbers: dict[tuple[int, ...], int] = {}
        known: dict[int, int] = {}  # by identity: a picture's thousand places share one set of thousands of codes
        index_BU = torch.zeros(len(rows), places, dtype=torch.int64)
        for row, pair in enumerate(rows):
            first = len(pair.decoder) - len(pair.allowed)
            for place, found in enumerate(pair.allowed):
                if id(found) not in known:
                    known[id(found)] = numbers.setdefault(found, len(numbers) + 1)
                index_BU[row, first + place] = known[id(found)]
        sets_SV = torch.zeros(len(numbers) + 1, self.tokenizer.vocab_size, dtype=torch.bool)
        sets_SV[0] = True
        for found, number in numbers.items():
            sets_SV[number, list(found)] = True
        return index_BU, sets_SV
