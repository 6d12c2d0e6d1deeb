"""Token ids: equal to CLIP's, to transformers' and to themselves."""

import json
import random

import pytest

from pretrain.config import ConfigError
from pretrain.data import tokenizer as tok

WORDS = """red green Blue cat dog café straße walking man's 22 it's 😀 naïve, (tiny) house! x² 日本
    grinning-face""".split()  # noqa: SIM905


def captions(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def trained() -> tok.Tokenizer:
    return tok.train(captions(400), 640)


@pytest.fixture(scope="module")
def clip() -> tok.Tokenizer:
    pytest.importorskip("open_clip")
    return tok.load("clip")


def test_clip_golden(clip):
    assert (clip.vocab_size, clip.start, clip.end) == (49408, 49406, 49407)
    assert clip.encode("a photo of a cat", 77) == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip.encode("X", 77) == clip.encode("x", 77) == [49406, 343, 49407]
    assert clip.encode("&lt;b&gt; Hello   World&amp;", 77) == clip.encode("<b> hello world&", 77)


def test_clip_equals_open_clip(clip):
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    texts = [*captions(300), "&lt;b&gt; Hello   World&amp;", "\ttab\nline ", "ﬁne “quoted”", "&amp;lt;p&amp;gt;", ""]
    assert [clip.encode(t, 200) for t in texts] == [[49406, *theirs.encode(t), 49407] for t in texts]
    assert clip.encode_batch(texts, 12) == [clip.encode(t, 12) for t in texts]


def test_cut_text_keeps_its_end(trained):
    ids = trained.encode("red " * 50, 8)
    assert len(ids) == 8 and ids[0] == trained.start and ids[-1] == trained.end
    with pytest.raises(ConfigError, match="no room"):
        trained.encode("red", 1)


def test_specials_are_the_last_ids(trained):
    assert (trained.start, trained.end, trained.pad) == (trained.vocab_size - 2, trained.vocab_size - 1, trained.end)
    assert max(max(ids) for ids in trained.encode_batch(captions(50, 9), 77)) == trained.end


def test_special_words_in_a_caption_are_text(trained):
    ids = trained.encode("red <|endoftext|> cat", 77)
    assert ids.count(trained.end) == 1 and ids[-1] == trained.end


def test_training_is_deterministic_and_covers_all_text(trained):
    again = tok.train(captions(400), 640)
    assert again.fingerprint == trained.fingerprint == "ca150d2d7804489e"
    assert trained.decode(trained.encode("Ωmega ☃ unseen", 77)) == "ωmega ☃ unseen"
    assert tok.train(captions(400, 1), 640).fingerprint != trained.fingerprint


def test_vocabulary_too_small():
    with pytest.raises(ConfigError, match="vocab_size 100 is below 514"):
        tok.train(["a"], 100)


@pytest.mark.parametrize("which", ["trained", "clip"])
def test_saved_folder_loads_in_transformers(which, request, tmp_path):
    from transformers import AutoTokenizer, CLIPTokenizer

    ours = request.getfixturevalue(which)
    ours.save(tmp_path)
    texts = [tok.clean(text) for text in captions(200, 3)]
    expected = [ours.encode(text, 77) for text in texts]
    for kind in (CLIPTokenizer, AutoTokenizer):
        theirs = kind.from_pretrained(str(tmp_path), local_files_only=True)
        assert theirs(texts, truncation=True, max_length=77)["input_ids"] == expected
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.start, ours.end, ours.pad)
        assert len(theirs) == ours.vocab_size
    again = tok.load(tmp_path)
    assert again.fingerprint == ours.fingerprint
    (tmp_path / "tokenizer.json").unlink()  # the older layout
    assert [tok.load(tmp_path).encode(text, 77) for text in texts] == expected


def test_processor_loads(trained, tmp_path):
    from transformers import CLIPImageProcessor, CLIPProcessor

    trained.save(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    processor = CLIPProcessor.from_pretrained(str(tmp_path), local_files_only=True)
    assert processor(text=["red cat"])["input_ids"] == [trained.encode("red cat", 77)]


def test_bert_folder(tmp_path):
    from transformers import BertTokenizer, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert BertTokenizer is not None
    ours = tok.load(tmp_path)
    assert (ours.start, ours.end, ours.pad) == (2, 3, 0)
    assert ours.encode("Red cats", 8) == [2, 5, 6, 7, 3]
    BertTokenizerFast.from_pretrained(str(tmp_path)).save_pretrained(tmp_path / "fast")
    assert tok.load(tmp_path / "fast").encode("Red cats", 8) == [2, 5, 6, 7, 3]
    ours.save(tmp_path / "saved")
    assert tok.load(tmp_path / "saved").encode("Red cats", 4) == [2, 5, 6, 3]


def test_bad_folders(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        tok.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tok.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tok.load(tmp_path)


def test_clip_without_open_clip(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install open_clip_torch"):
        tok.load("clip")
