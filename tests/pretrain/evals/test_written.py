"""Evals of text: a model that knows gets every point, one that does not loses them, and the report shows its words."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pretrain import recipe, registry
from pretrain.batch import Example
from pretrain.config import ConfigError, build
from pretrain.data import bins, synthetic, tokenizer
from pretrain.data.asked import Asked
from pretrain.data.compose import IGNORE, Composer
from pretrain.data.symbols import symbol
from pretrain.evals import base
from pretrain.metrics.interval import Score
from pretrain.models import vlt5
from pretrain.report import page, write
from pretrain.report.run import Run
from tests import tiny
from tests.pretrain.evals import knowing

COLOURS = sorted(synthetic.COLOURS)


def colour(meta: dict) -> str:
    return meta["label"].split()[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def run(
    corpus: Path, name: str, says, *, doubt: float = 0.0, symbols=knowing.SYMBOLS, **keys
) -> tuple[dict[str, Score], base.Eval]:
    plug = registry.find("pretrain.evals", name)
    options = {"data": f"{corpus}/shapes-00000.tar", "batch_size": 7, **keys}
    made = plug.Eval(build(plug.Config, options, where=name))
    return made.run(knowing.features(corpus, says, doubt=doubt, symbols=symbols)), made


def panel(made: base.Eval, name: str, folder: Path) -> str:
    (folder / f"{name}.json").write_text(json.dumps({"step": 3, **made.examples}))
    return registry.find(write.PANELS, "written").panel(Run(folder))


def test_captions(corpus: Path, tmp_path: Path) -> None:
    found, made = run(corpus, "captioning", lambda meta: meta["captions"][1], examples=4)
    assert found["simple/BLEU-4"].value == pytest.approx(1.0) and found["simple/ROUGE-L"].value == pytest.approx(1.0)
    assert found["simple/CIDEr-D"].value > 3 and found["simple/CIDEr-D"].count == 48
    other, _ = run(corpus, "captioning", lambda meta: "something else", write={"beams": 1})
    assert other["simple/CIDEr-D"].value == 0
    shown = panel(made, "captioning", tmp_path)
    assert shown.count("<img") == 4 and shown.count("a picture of one") == 8


def test_answers(corpus: Path, tmp_path: Path) -> None:
    """Eight of ten people say the colour, one says `light` before it: 1, and 0.3 for what one has said."""
    right, made = run(corpus, "vqa", colour, examples=2)
    assert right["accuracy"].value == 1
    said_once, _ = run(corpus, "vqa", lambda meta: f"light {colour(meta)}")
    assert said_once["accuracy"].value == pytest.approx(0.3)
    albef = {"how": "rank", "likeliest": 3, "among_answers": False, "chunk": 2}
    for how in ({"how": "answers"}, {"how": "rank"}, albef):
        assert run(corpus, "vqa", colour, doubt=0.1, answers=COLOURS, **how)[0]["accuracy"].value == 1
    assert "what colour is the circle?" in panel(made, "vqa", tmp_path)


def test_answers_are_spelled_as_the_instruction_does(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.txt"
    file.write_text("\n".join(name.upper() for name in COLOURS))
    keys = {"instruction": {"ofa": {"tasks": ["question"], "prompt": "source"}}, "how": "answers", "answers": str(file)}
    for how in ("answers", "rank"):
        # the decoder reads the question first, so what it knows begins behind as many places
        found, _ = run(corpus, "vqa", _behind_the_question, doubt=0.1, **{**keys, "how": how})
        assert found["accuracy"].value == 1


def _behind_the_question(meta: dict) -> str:
    return f"{meta['given text']} {colour(meta)}"


def test_labels(corpus: Path) -> None:
    words = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}
    found, _ = run(corpus, "entailment", lambda meta: words[meta["gold_label"]], doubt=0.1, sentence="gold_label")
    assert found == {"accuracy": Score(1, found["accuracy"].low, 1, 48), "consistency": found["consistency"]}
    assert found["consistency"].value == 1 and found["consistency"].count == 3
    found, _ = run(corpus, "entailment", lambda meta: "yes", doubt=0.1, sentence="gold_label")
    assert found["accuracy"].value == found["consistency"].value == pytest.approx(1 / 3)


def test_boxes(corpus: Path, tmp_path: Path) -> None:
    section = bins.Config(bins=33, divisor=None)
    keys = {"instruction": {"ofa": {"tasks": ["locate"], "boxes": section.model_dump()}}, "write": {"beams": 2}}

    def says(meta: dict) -> str:
        return bins.text(build_box(meta["said box"]), 32, section)[0]

    found, made = run(corpus, "grounding", says, doubt=0.1, **keys)
    assert found["Acc@0.5"].value > 0.95 and 0.85 < found["mean_iou"].value <= 1, "bins are a pixel wide"
    wrong, _ = run(corpus, "grounding", lambda meta: " ".join(symbol(f"<bin_{n}>") for n in (0, 0, 1, 1)), **keys)
    assert wrong["Acc@0.5"].value == 0
    shown = panel(made, "grounding", tmp_path)
    assert shown.count("<rect") == 2 * 6 and "which region does the text" in shown
    with pytest.raises(ConfigError, match="which the model's vocabulary has not"):
        run(corpus, "grounding", says, instruction={"ofa": {"tasks": ["locate"]}})


def test_regions_and_cells(corpus: Path) -> None:
    """Where there is one region, it is the likeliest one, but not of all words; a cell is found where it is covered."""
    symbols = vlt5.SYMBOLS
    keys = {"symbols": symbols, "regions": {"boxes": "json:box", "layout": "xywh", "features": None}}
    lay = {"vlt5": {"tasks": ["refcocog"]}}
    found, made = run(corpus, "grounding", lambda meta: symbol("<vis_extra_id_0>"), instruction=lay, **keys)
    one = {"Acc@0.5", "any_word/Acc@0.5", "oracle/Acc@0.5", "mean_iou"}
    assert found.keys() == one and all(score.value == 1 for score in found.values())
    assert made.examples["written"][0]["given"].startswith("visual grounding: the ")
    found, _ = run(corpus, "grounding", lambda meta: "circle", instruction=lay, **keys)
    assert (found["Acc@0.5"].value, found["any_word/Acc@0.5"].value) == (1, 0)
    with pytest.raises(ConfigError, match="the model names regions, and the data gives none"):
        run(corpus, "grounding", str, symbols=symbols)
    cells = {"vlt5": {"tasks": ["refcocog"], "grid": [3, 3]}}
    found, _ = run(corpus, "grounding", lambda meta: symbol(f"<vis_extra_id_{middle(meta)}>"), symbols=symbols,
                   instruction=cells)  # fmt: skip
    assert found.keys() == {"cell@0.5", "any_word/cell@0.5", "oracle/cell@0.5", "mean_covered"}
    assert found["oracle/cell@0.5"].value >= found["cell@0.5"].value > 0.8


def middle(meta: dict) -> int:
    x0, y0, x1, y1 = meta["said box"]
    return int(3 * (y0 + y1) / 2) * 3 + int(3 * (x0 + x1) / 2)


def build_box(box: list[float]) -> np.ndarray:
    return np.array([box], dtype=np.float32)


def test_translations(corpus: Path) -> None:
    pytest.importorskip("sacrebleu")
    found, _ = run(corpus, "translation", lambda meta: meta["translation"]["de"], lowercase=True)
    assert found["BLEU"].value == pytest.approx(1.0)


def test_what_a_score_needs_is_missed_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="BLEU of translations needs sacrebleu"):
        recipe.plug_ins("pretrain.evals", {"translation": {"data": "a.tar"}})


def test_surprise_is_what_the_model_doubts(corpus: Path) -> None:
    """Each token has probability 1 - doubt, so perplexity is 1 / (1 - doubt)."""
    found, _ = run(corpus, "perplexity", lambda meta: meta["said text"], doubt=0.2)
    assert found["perplexity"].value == pytest.approx(1.25)
    assert found["perplexity"].low == pytest.approx(1.25) and found["perplexity"].unit == ""
    assert 0 < found["bits_per_byte"].value < 1


def test_bytes_that_are_not_scored_are_not_counted(corpus: Path) -> None:
    """A decoder of few places reads the beginnings of texts: their bits are those of these bytes."""
    plug = registry.find("pretrain.evals", "perplexity")
    made = plug.Eval(plug.Config(data=f"{corpus}/shapes-00000.tar", batch_size=7))
    cut = knowing.features(corpus, lambda meta: meta["said text"], doubt=0.2, written=5)
    words, bits, size = cut.composer.tokenizer, 0.0, 0
    for batch in made.batches(cut, asked=True):
        texts = [words.ids(meta["said text"])[:4] for meta in batch.meta]
        bits -= float(cut.likelihood(batch, texts).sum()) / math.log(2)
        size += sum(len(words.decode(text)) for text in texts[: len(batch) - batch.filler])
    assert made.run(cut)["bits_per_byte"].value == pytest.approx(bits / size, rel=1e-6)


def test_listed_answers_are_compared_as_they_are_ranked(corpus: Path) -> None:
    """The right one is likelier than a long one whose words follow from each other; a mean over tokens hides that."""
    listed = {"doubt": 0.997, "answers": [*COLOURS, "umpteen words in one long row"]}
    for how in ("answers", "rank"):
        assert run(corpus, "vqa", colour, how=how, **listed)[0]["accuracy"].value == 1
    mean = {"beams": 5, "length_penalty": 1.0}
    assert run(corpus, "vqa", colour, how="answers", write=mean, **listed)[0]["accuracy"].value == 0


def test_a_prompt_that_fills_all_places_is_not_given_its_end() -> None:
    words = tokenizer.train([], 514)
    asked = Asked(Composer(words, context_length=8))
    batch = asked.collate([asked.row(Example(key, [], prefix=key * 3), []) for key in ("ab", "abcdefgh")])
    given_BT = batch.valid_BT & (batch.labels_BT == IGNORE)
    assert given_BT.sum(1).tolist() == [7, 7] and asked.room(batch) == [2, 2]
    assert (batch.tokens_BT[given_BT] != words.end).all()


def test_nothing_of_the_answer_is_shown(corpus: Path) -> None:
    features = knowing.features(corpus, lambda meta: "")
    plug = registry.find("pretrain.evals", "captioning")
    made = plug.Eval(plug.Config(data=f"{corpus}/shapes-00000.tar", batch_size=7))
    for batch in made.batches(features, asked=True):
        words = features.composer.tokenizer
        assert batch.tokens_BT.tolist() == [[words.start, words.end]] * len(batch)
        assert batch.decoder_tokens_BU.tolist() == [[words.start]] * len(batch)
        assert features.asked.prompts(batch) == [[]] * len(batch) and features.asked.room(batch) == [40] * len(batch)


def test_refusals(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"evals.captioning needs \['generate'\], the model provides \['image'"):
        base.refuse_unserved({"captioning": None}, ("image", "text"))
    for name, reader, missing in (("vqa", "caption", "answers"), ("entailment", "vqa", "labels")):
        with pytest.raises(ConfigError, match=rf"evals\.{name}\.reader: {reader} (gives|has) no {missing}"):
            run(corpus, name, lambda meta: "x", reader={reader: {}})
    with pytest.raises(ConfigError, match=r"evals\.grounding\.reader: caption gives no boxes; take grounding"):
        boxes = {"instruction": {"ofa": {"tasks": ["caption"], "boxes": {"bins": 33}}}}
        run(corpus, "grounding", lambda meta: "x", reader={"caption": {}}, **boxes)
    for name, keys in (("vqa", {"how": "answers", "answers": COLOURS}), ("grounding", {})):
        for rule in ("no_repeat", "min_tokens"):
            with pytest.raises(ConfigError, match="no_repeat and min_tokens are for free text"):
                run(corpus, name, str, write={rule: 3}, **keys)
    with pytest.raises(ConfigError, match="answers: a list or a file for how"):
        run(corpus, "vqa", str, how="rank")
    with pytest.raises(ConfigError, match="has 5 tokens, the model has places for 3"):
        plug = registry.find("pretrain.evals", "grounding")
        section = {"instruction": {"ofa": {"tasks": ["locate"], "boxes": {"bins": 33}}}}
        config = build(plug.Config, {"data": f"{corpus}/shapes-00000.tar", **section}, where="x")
        plug.Eval(config).run(knowing.features(corpus, lambda meta: "", written=3))


def test_words_of_strangers_stay_words(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    card = {"given": evil, "written": evil, "people": [evil], "image": f'x" onerror="{evil}', "boxes": [[evil] * 4]}
    (tmp_path / "vqa.json").write_text(json.dumps({"step": 1, "written": [card, "torn"]}))
    (tmp_path / "captioning.json").write_text(json.dumps({"written": {"no": "list"}}))
    shown = registry.find(write.PANELS, "written").panel(Run(tmp_path))
    assert "<script" not in shown and "onerror" not in shown and shown.count(page.text(evil)) == 3
