"""Models that write, trained for two steps with evals of all they write, under ZeRO-3: evaluate.py says the same."""

import json
from pathlib import Path

import pytest

from pretrain import evaluate, pretrained
from pretrain.config import ConfigError
from pretrain.data import synthetic, tokenizer
from pretrain.export import export
from tests import tiny
from tests.end_to_end.jobs import pretrain

SLOW = pytest.mark.slow
BINS = "{bins: 33, divisor: null}"
OFA = """
  name: ofa
  width: 16
  hidden: 32
  heads: 2
  encoder_layers: 1
  decoder_layers: 1
  stem: [1, 1, 1]
  stem_width: 4
  image_size: 32
  code_image_size: 32
  codes: 8
  bins: 33
  source_length: 60
  target_length: 12
  positions: 128
  token_bucket: 8
  image_bucket: 6"""
VLT5 = """
  name: vlt5
  text:
    {backbone: KIND, width: 16, layers: 1, heads: 2, hidden: 24, source_length: 60, target_length: 12, positions: 80}
  vision: {source: grid, tower: {name: test_convnext, image_size: 64}}"""
FUSED = """
  vision: {name: test_convnext, image_size: 32}
  text: {width: 32, layers: 1, heads: 2, context_length: 40}
  embed_dim: 16
  fusion: {layers: 1}"""
COCA = """
  name: coca
  vision: {name: test_convnext, image_size: 32}
  text: {width: 32, layers: 1, heads: 2, context_length: 40}
  embed_dim: 16"""


def config(folder: Path, name: str, model: str, objectives: str, paper: str) -> Path:
    """Write a config whose evals cover what the model writes; `paper` names its instructions, if it has any."""
    shards = f"{folder}/shapes-00000.tar"
    lay = {
        "ofa": {"c": "[caption]", "v": "[question]", "e": "[entail]", "g": f"[locate], boxes: {BINS}"},
        "vlt5": {"c": "[caption]", "v": "[vqa]", "e": "[nlvr]", "g": "[refcocog], grid: [2, 2]"},
    }.get(paper, {})
    said = {key: f", instruction: {{{paper}: {{tasks: {found}}}}}" for key, found in lay.items()}
    about = f'data: "{shards}", batch_size: 9, examples: 2'
    grounding = f"grounding: {{{about}{said['g']}, write: {{beams: 2}}}}" if lay else ""
    data = f", instruction: {{{paper}: {{tasks: [caption]}}}}" if lay else ""
    text = f"""
run: {{name: {name}, dir: {folder}/runs, seed: 3}}
data: {{shards: "{shards}", lanes: 4, workers: 0{data}}}
model:
  tokenizer: {folder}/tokenizer{model}
objectives: {objectives}
train: {{steps: 2, batch_size: 8}}
optim: {{lr: 1.0e-3, warmup: 1}}
checkpoint: {{every_steps: 2}}
monitor: {{log_every: 1, tensorboard: false}}
evals:
  captioning: {{{about}{said.get("c", "")}, write: {{beams: 2, max_tokens: 6}}}}
  vqa: {{{about}{said.get("v", "")}, write: {{max_tokens: 4}}}}
  entailment: {{{about}{said.get("e", "")}}}
  perplexity: {{data: "{shards}", batch_size: 9{said.get("c", "")}}}
  {grounding}
"""
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def scores(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    return {line["name"]: line["value"] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "objectives", "paper", "world", "stage"),
    [
        ("ofa", OFA, "{instruction: {}}", "ofa", 2, 3),
        pytest.param("t5", VLT5.replace("KIND", "t5"), "{instruction: {reduction: sample}}", "vlt5", 2, 3, marks=SLOW),
        pytest.param("bart", VLT5.replace("KIND", "bart"), "{instruction: {}}", "vlt5", 1, 1, marks=SLOW),
        pytest.param("fused", FUSED, "{mixed_lm: {}}", "", 2, 3, marks=SLOW),
        pytest.param("coca", COCA, "{captioning: {}}", "", 2, 3, marks=SLOW),
    ],
)
def test_what_a_run_writes_is_scored_again_by_evaluate(
    ranks, tmp_path: Path, name: str, model: str, objectives: str, paper: str, world: int, stage: int
) -> None:
    file = config(tiny.corpus(tmp_path), name, model, objectives, paper)
    run = tmp_path / "runs" / name
    ranks.run(world, pretrain, file, f"zero.stage={stage}")
    trained = scores(run)
    expected = {"captioning/simple/CIDEr-D", "vqa/accuracy", "entailment/accuracy", "perplexity/perplexity"}
    assert expected <= trained.keys() and (not paper or {"grounding/Acc@0.5", "grounding/cell@0.5"} & trained.keys())
    assert trained["perplexity/perplexity"] > 1
    found = evaluate.evaluate(str(run), evaluate.read_evals(str(run), None, []))
    assert {key: score.value for key, score in found.items()} == pytest.approx(trained, rel=1e-4, abs=1e-6)
    assert "<h2>Captions</h2>" in (run / "report.html").read_text()
    export(pretrained.load(run), tmp_path / "export", format="diptych")
    again = evaluate.evaluate(str(tmp_path / "export"), evaluate.read_evals(str(run), None, []))
    assert again == found
    if paper == "vlt5":
        other = evaluate.read_evals(str(run), None, ["evals.grounding.instruction.vlt5.grid=[3, 3]"])
        with pytest.raises(ConfigError, match=r"evals\.grounding\.instruction\.vlt5\.grid: 3 x 3 cells"):
            evaluate.evaluate(str(run), other)


WIDE = OFA.replace("width: 16\n  hidden: 32", "width: 64\n  hidden: 128\n  dropout: 0.0\n  drop_path: 0.0")
WIDE_T5 = VLT5.replace("KIND, width: 16", "t5, dropout: 0.0, width: 64").replace("hidden: 24", "hidden: 128")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "paper", "words", "score"),
    [
        ("captions", WIDE, "ofa", (), "captioning/simple/BLEU-4"),
        ("boxes", WIDE, "ofa", ("data.reader={grounding: {}}",
         f"data.instruction={{ofa: {{tasks: [locate], boxes: {BINS}}}}}"), "grounding/Acc@0.5"),
        ("answers", WIDE_T5, "vlt5", ("data.reader={vqa: {choose: heaviest}}",
         "data.instruction={vlt5: {tasks: [vqa]}}"), "vqa/accuracy"),
    ],
)  # fmt: skip
def test_what_was_learned_by_heart_is_written(
    ranks, tmp_path: Path, name: str, model: str, paper: str, words: tuple[str, ...], score: str
) -> None:
    """Training and writing agree on every shift, opening, blank and bin: 24 samples are repeated nearly as they are."""
    synthetic.write(tmp_path, shards=1, samples=24, size=32)
    asked = "what does the image describe? which region does the text describe? vqa: what colour is the"
    lines = [f"a picture of one {label} on a plain ground {asked}" for label in synthetic.CLASSES]
    tokenizer.train(lines, 900).save(tmp_path / "tokenizer")
    file = config(tmp_path, name, model, "{instruction: {}}", paper)
    ranks.run(1, pretrain, file, "train.steps=240", "train.batch_size=24", "optim.lr=3.0e-3", "optim.warmup=10",
              "checkpoint.every_steps=1000", "evals.captioning.write.max_tokens=12", *words, timeout=900)  # fmt: skip
    assert scores(tmp_path / "runs" / name)[score] > 0.8
