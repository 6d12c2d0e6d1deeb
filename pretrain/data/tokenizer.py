"""Text to token ids: CLIP's byte-level BPE (built in, trained or loaded) and any other Hugging Face tokenizer folder.

CLIP's way (Radford et al. 2021, arXiv:2103.00020): repair, unescape twice, collapse white space, lower-case; then BPE
over bytes with `</w>` at the end of a word; specials are the two largest ids, the end token the largest of all.
A folder of another kind (BERT, GPT-2, T5, ...) is used as it is: its own normaliser, its own specials.
"""

import gzip
import hashlib
import html
import importlib.util
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pretrain.config import ConfigError
from pretrain.data import symbols

START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"
MASK = "<mask>"  #: what instructions and models call the mask token, whatever its own name is
CLIP_MERGES = 49152 - 256 - 2  # the lines of the table that the released models use
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clean(text: str) -> str:
    """Return text as CLIP's BPE wants it: repaired, unescaped twice, single spaces, lower case."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # plain ASCII has nothing to repair
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class Tokenizer:
    """A tokenizer with known start, end and padding ids."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        start: int | None,
        end: int | None,
        pad: int,
        clip: bool,
        mask: int | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "<|endoftext|>" in a caption is text, it ends nothing
        self.backend = backend
        self.start, self.end, self.pad, self.mask = start, end, pad, mask
        self.clip = clip  #: clean as CLIP does before the backend sees the text

    @property
    def vocab_size(self) -> int:
        """Return the number of ids."""
        return int(self.backend.get_vocab_size())

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the vocabulary, its merges and the special ids (not of the library's file format)."""
        merges = [
            pair if isinstance(pair, str) else " ".join(pair)
            for pair in json.loads(self.backend.to_str())["model"].get("merges", ())
        ]
        vocab = sorted(self.backend.get_vocab().items())
        text = json.dumps([vocab, merges, self.start, self.end, self.pad, self.clip])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def encode(self, text: str, context_length: int) -> list[int]:
        """Return [start] + ids + [end], at most `context_length` long; what is cut off is never the end token."""
        return self.wrap(self.ids(text), context_length)

    def encode_batch(self, texts: Sequence[str], context_length: int) -> list[list[int]]:
        """Return `encode` of many texts."""
        found = self.backend.encode_batch([self._clean(text) for text in texts], add_special_tokens=False)
        return [self.wrap(encoding.ids, context_length) for encoding in found]

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text alone, without specials but for the symbols that were laid in it (data.symbols)."""
        if symbols.MARK not in text:
            return list(self.backend.encode(self._clean(text), add_special_tokens=False).ids)
        out: list[int] = []
        for piece, laid in symbols.pieces(text):
            known = self.symbol(piece) if laid else None
            out += self.ids(piece) if known is None else [known]
        return out

    def symbol(self, name: str) -> int | None:
        """Return the id of a symbol, None where the vocabulary has none of that name; "<mask>" is the mask token."""
        if name == MASK and self.mask is not None:
            return self.mask
        found: int | None = self.backend.token_to_id(name)
        return found

    def extended(self, names: Sequence[str]) -> "Tokenizer":
        """Return the tokenizer with these symbols, as the last ids of its vocabulary in this order.

        Those that it has already must be its last ids: T5's own `<extra_id_0>` are, of a folder of T5.

        Raises:
            ConfigError: it has some of them elsewhere.
        """
        if not names:
            return self
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([name for name in names if backend.token_to_id(name) is None])
        first = int(backend.get_vocab_size()) - len(names)
        wrong = next((n for place, n in enumerate(names) if backend.token_to_id(n) != first + place), None)
        if wrong is not None:
            raise ConfigError(
                f"tokenizer: it has {wrong!r} as id {backend.token_to_id(wrong)}, where the model's {len(names)} "
                f"symbols are the last ids, from {first} on; take a tokenizer without it"
            )
        mask = backend.token_to_id(MASK) if self.mask is None else self.mask
        return Tokenizer(backend, start=self.start, end=self.end, pad=self.pad, clip=self.clip, mask=mask)

    def wrap(self, ids: Sequence[int], context_length: int) -> list[int]:
        """Return ids between the specials, cut to `context_length`."""
        head = [] if self.start is None else [self.start]
        tail = [] if self.end is None else [self.end]
        room = context_length - len(head) - len(tail)
        if room < 0:
            raise ConfigError(f"context length {context_length} has no room for the start and end tokens")
        return [*head, *ids[:room], *tail]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; specials are left out."""
        specials = {self.start, self.end, self.pad}
        text = str(self.backend.decode([i for i in ids if i not in specials], skip_special_tokens=False))
        return text.replace(SUFFIX, " ").strip() if self.clip else text

    def _clean(self, text: str) -> str:
        return clean(text) if self.clip else text

    def save(self, folder: str | Path) -> None:
        """Write a folder that AutoTokenizer, CLIPTokenizer and CLIPProcessor load offline with the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.save(str(folder / "tokenizer.json"))
        names = {role: self.backend.id_to_token(i) for role, i in self._roles().items() if i is not None}
        tree: dict[str, Any] = {**names, "tokenizer_class": "CLIPTokenizer" if self.clip else "PreTrainedTokenizerFast"}
        if self.clip:
            tree["do_lower_case"] = True
            model = json.loads(self.backend.to_str())["model"]
            _dump(folder / "vocab.json", model["vocab"])
            rows = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *rows]) + "\n", encoding="utf-8")
        _dump(folder / "tokenizer_config.json", tree)
        _dump(folder / "special_tokens_map.json", names)

    def _roles(self) -> dict[str, int | None]:
        first, last = ("bos_token", "eos_token") if not self._bert else ("cls_token", "sep_token")
        unknown = {"unk_token": self.end} if self.clip else {}
        mask = {} if self.mask is None else {"mask_token": self.mask}
        return {first: self.start, last: self.end, "pad_token": self.pad, **mask, **unknown}

    @property
    def _bert(self) -> bool:
        return isinstance(self.backend.model, models.WordPiece)


def load(where: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder, or CLIP's own for the word "clip".

    Raises:
        ConfigError: no such folder, no tokenizer in it, or open_clip_torch is not installed.
    """
    if str(where) == "clip":
        return _clip()
    folder = Path(where)
    if not folder.is_dir():
        raise ConfigError(
            f'tokenizer {str(where)!r}: no such folder; name a tokenizer folder, or "clip" for CLIP\'s own'
        )
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            return _wrap(tokenizers.Tokenizer.from_file(str(file)), _specials(folder))
        from transformers import AutoTokenizer  # here: seconds of import that a tokenizer.json does not need

        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True)
        return _wrap(slow.backend_tokenizer, {name: str(token) for name, token in slow.special_tokens_map.items()})
    except ConfigError:
        raise
    except Exception as error:  # the libraries raise bare Exception on damaged files
        raise ConfigError(
            f"tokenizer {folder}: cannot be loaded ({error}); it needs tokenizer.json, vocab.json and merges.txt, "
            "or vocab.txt, as transformers' save_pretrained writes them"
        ) from error


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a CLIP-style BPE learned from texts; equal texts give equal vocabularies.

    The vocabulary is smaller than `vocab_size` where the texts do not hold that many different pieces.

    Raises:
        ConfigError: `vocab_size` leaves no room beside the 512 byte symbols and the two specials.
    """
    symbols = _byte_symbols()
    base = [*symbols, *(symbol + SUFFIX for symbol in symbols)]
    if vocab_size < len(base) + 2:
        raise ConfigError(f"tokenizer: vocab_size {vocab_size} is below {len(base) + 2}, the bytes and two specials")
    backend = _bpe(base, [])
    # the base symbols go in as "specials" to fix their ids: the trainer breaks ties by id, else by the order of a hash
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=base,
        end_of_word_suffix=SUFFIX,
        show_progress=False,
    )
    backend.train_from_iterator((clean(text) for text in texts), trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return _wrap(_bpe(base, merges), {"bos_token": START, "eos_token": END, "pad_token": END})


def _clip() -> Tokenizer:
    found = importlib.util.find_spec("open_clip")
    name = "bpe_simple_vocab_16e6.txt.gz"
    table = Path(found.origin).parent / name if found and found.origin else None
    if table is None or not table.is_file():
        raise ConfigError(
            'tokenizer "clip": the table of CLIP\'s merges comes with open_clip_torch, which is not installed; '
            "run `pip install open_clip_torch`, or name a tokenizer folder"
        )
    with gzip.open(table, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : CLIP_MERGES + 1]
    symbols = _byte_symbols()
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    base = [*symbols, *(symbol + SUFFIX for symbol in symbols)]
    return _wrap(_bpe(base, merges), {"bos_token": START, "eos_token": END, "pad_token": END})


def _byte_symbols() -> list[str]:
    """Return a printable character for each byte, in CLIP's order: printable bytes first, then the rest above 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(rest))]


def _bpe(base: list[str], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    names = list(dict.fromkeys([*base, *(left + right for left, right in merges)]))
    vocab = {token: number for number, token in enumerate([*names, START, END])}
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix=SUFFIX
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        (END, vocab[END]), (START, vocab[START]), trim_offsets=False, add_prefix_space=False
    )
    backend.add_special_tokens([START, END])
    return backend


def _wrap(backend: tokenizers.Tokenizer, names: dict[str, str]) -> Tokenizer:
    def number(*roles: str) -> int | None:
        found = (backend.token_to_id(names[role]) for role in roles if names.get(role))
        return next((i for i in found if i is not None), None)

    start, end = number("cls_token", "bos_token"), number("sep_token", "eos_token")
    if end is None:
        raise ConfigError("it names no end token (eos_token or sep_token in tokenizer_config.json)")
    pad = number("pad_token")
    clip = isinstance(backend.model, models.BPE) and backend.model.end_of_word_suffix == SUFFIX
    mask = number("mask_token")
    return Tokenizer(backend, start=start, end=end, pad=end if pad is None else pad, clip=clip, mask=mask)


def _specials(folder: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            tree = json.loads((folder / file).read_text(encoding="utf-8"))
            for role, token in tree.items():
                if role.endswith("_token") and token:
                    names[role] = str(token["content"] if isinstance(token, dict) else token)
    return names


def _dump(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
