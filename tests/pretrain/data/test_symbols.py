"""Symbols in texts: laid ones become ids, those of users stay text; a vocabulary that has grown saves and loads."""

import pytest
import tokenizers

from pretrain.config import ConfigError
from pretrain.data import symbols
from pretrain.data import tokenizer as tok
from pretrain.data.symbols import pieces, plain, symbol

NAMES = ("<mask>", *(f"<code_{n}>" for n in range(4)), *(f"<bin_{n}>" for n in range(10)))


@pytest.fixture(scope="module")
def base() -> tok.Tokenizer:
    return tok.train(["a red cat < bin _ 3 >", "a blue dog"], 560)


@pytest.fixture(scope="module")
def words(base) -> tok.Tokenizer:
    return base.extended(NAMES)


def test_symbols_are_the_last_ids_in_their_order(base, words):
    assert words.vocab_size == base.vocab_size + len(NAMES)
    assert [words.symbol(name) for name in NAMES] == list(range(base.vocab_size, words.vocab_size))
    assert (words.start, words.end, words.pad) == (base.start, base.end, base.pad)
    assert words.mask == words.symbol("<mask>") and base.mask is None


def test_laid_symbols_are_ids_and_written_ones_are_text(base, words):
    laid = f"a cat {symbol('<bin_3>')} {symbol('<bin_4>')} dog"
    assert words.ids(laid) == [*words.ids("a cat"), words.symbol("<bin_3>"), words.symbol("<bin_4>"), *words.ids("dog")]
    assert words.ids("a cat <bin_3> dog") == base.ids("a cat <bin_3> dog")
    assert base.ids(laid) == base.ids("a cat") + base.ids("<bin_3>") + base.ids("<bin_4>") + base.ids("dog")


def test_save_and_load_keep_ids_and_fingerprint(base, words, tmp_path):
    words.save(tmp_path)
    again = tok.load(tmp_path)
    assert again.fingerprint == words.fingerprint != base.fingerprint
    assert again.mask == words.mask and again.ids(symbol("<bin_9>")) == [words.vocab_size - 1]
    assert again.ids("<bin_9>") == base.ids("<bin_9>")
    assert again.extended(NAMES).fingerprint == words.fingerprint, "a run's own tokenizer has them already"
    assert words.decode([words.symbol("<bin_9>"), *words.ids("cat")]).replace(" ", "") == "<bin_9>cat"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids("<code_2>") == words.symbol("<code_2>")


def test_symbols_that_lie_elsewhere_are_refused(base, words):
    with pytest.raises(ConfigError, match="'<bin_1>' as id"):
        words.extended(["<bin_1>", "<bin_0>"])
    assert base.extended(()) is base


def t5_like() -> tok.Tokenizer:
    """A tokenizer with sentinels of its own, as T5's: only what is missing is added."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3}, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens([f"<extra_id_{n}>" for n in reversed(range(5))])
    return tok.Tokenizer(backend, start=None, end=1, pad=0, clip=False)


def test_a_tokenizer_that_has_some_of_them():
    words = t5_like()
    names = [f"<{kind}extra_id_{n}>" for kind in ("", "vis_") for n in reversed(range(5))]
    grown = words.extended(names)
    assert grown.vocab_size == words.vocab_size + 5
    assert [grown.symbol(f"<vis_extra_id_{n}>") for n in range(5)] == [grown.vocab_size - 1 - n for n in range(5)]


def test_pieces():
    text = f" what? region: {symbol('<bin_1>')} {symbol('<bin_2>')} a cat "
    assert pieces(text) == [(" what? region:", False), ("<bin_1>", True), ("<bin_2>", True), (" a cat ", False)]
    assert pieces(f"a {symbols.MARK}<bin_") == [("a", False)]
    assert plain(text) == " what? region: <bin_1> <bin_2> a cat "
    assert pieces("") == []
