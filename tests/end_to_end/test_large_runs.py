"""A run with all that large models need, by config alone: trains as without, goes on, and its average counts."""

import json
from pathlib import Path

import pytest

from pretrain import evaluate, export, pretrained
from pretrain.engine import checkpoint
from tests import tiny
from tests.end_to_end.jobs import losses, pretrain
from tests.ranks import RankError

VIT = (
    "model.vision.name=vit_base_patch32_clip_224",
    "model.vision.args={embed_dim: 32, depth: 3, num_heads: 2, patch_size: 8}",
    "model.vision.patch_dropout=0.5",
    "model.text.layers=2",
    "optim.layer_decay={vision: 0.8, text: 0.9}",
    "optim.schedule=constant_cooldown",
    "ema.decay=0.9",
    "train.steps=6",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=9",
)
LEAN = (
    "zero.stage=3",
    "zero.init=parts",
    "zero.offload=all",
    "model.vision.checkpointing=true",
    "model.text.checkpointing=2",
    "train.micro_batch_size=4",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole config over real shards."""
    return tiny.config_file(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def plain(ranks, config: Path) -> Path:
    """A run of one rank that keeps all it computes."""
    ranks.run(1, pretrain, config, "run.name=plain", "evals.retrieval.every_steps=3", *VIT)
    return config.parent / "runs" / "plain"


def scores(lines: Path) -> dict[str, float]:
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    return {line["name"]: line["value"] for line in found if line["step"] == 6}


def test_a_lean_run_trains_as_a_plain_one(ranks, config, plain):
    ranks.run(2, pretrain, config, "run.name=lean", *VIT, *LEAN)
    lean = config.parent / "runs" / "lean"
    assert losses(lean) == pytest.approx(losses(plain), rel=1e-4)
    log = (lean / "log.txt").read_text()
    assert "parameter group vision layer 0 of 4, decayed" in log and "learning rate x 0.4096" in log


def test_a_lean_run_goes_on_from_a_plain_one(ranks, config, plain):
    words = ("run.name=further", "evals={}", f"checkpoint.resume={plain}/checkpoints/step-00000003")
    ranks.run(2, pretrain, config, *words, *VIT, *LEAN)
    ours, theirs = losses(config.parent / "runs" / "further"), losses(plain)
    assert ours == pytest.approx({step: theirs[step] for step in (4, 5, 6)}, rel=1e-4)


def test_evals_and_exports_have_the_average(plain, tmp_path):
    newest = plain / "checkpoints/step-00000006"
    average, last = checkpoint.read_weights(newest, average=True), checkpoint.read_weights(newest)
    found, raw = pretrained.load(plain), pretrained.load(plain, average=False)
    name = "vision.projection.weight"
    assert found.model.get_parameter(name).equal(average[f"model.{name}"])
    assert raw.model.get_parameter(name).equal(last[f"model.{name}"])
    assert found.weights_hash != raw.weights_hash
    assert not found.config.vision.patch_dropout and found.config.vision.checkpointing is False
    assert evaluate.main([str(plain), "--json", str(tmp_path / "scores.json")]) == 0
    offline = json.loads((tmp_path / "scores.json").read_text())
    assert {key: score["value"] for key, score in offline.items()} == scores(plain / "evals.jsonl")
    for words, expected in (([], found), (["--no-ema"], raw)):
        out = tmp_path / f"export{len(words)}"
        assert export.main([str(plain), str(out), "--format", "diptych", *words]) == 0
        assert json.loads((out / export.MARK).read_text())["weights_hash"] == expected.weights_hash


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("zero.stage=1", "'parts' needs zero.stage=3"),
        ("model.text.name=hf:somewhere", "transformers reads the weights of model.text.name whole"),
        ("optim.layer_decay={visoin: 0.5}", "Did you mean 'vision'"),
        ("model.vision.name=test_resnet", "model.vision.patch_dropout: timm's test_resnet cannot leave patches out"),
    ],
)
def test_what_does_not_go_together_is_refused(ranks, config, word, sentence):
    with pytest.raises(RankError, match=sentence):
        args = "model.vision.args={}" if "resnet" in word else "evals={}"
        ranks.run(1, pretrain, config, "run.name=refused", *VIT, "zero.stage=3", "zero.init=parts", args, word)
