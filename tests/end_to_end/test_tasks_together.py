"""OFA in small, as a run: pairs, texts, images and objects in two mini-batches a step; it resumes bit for bit."""

from pathlib import Path

import pytest

from pretrain import config, recipe
from pretrain.engine import checkpoint
from pretrain.recipe import Recipe
from tests import tiny
from tests.end_to_end.jobs import losses, pretrain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole config over real shards."""
    folder = tiny.corpus(tmp_path_factory.mktemp("tasks"), samples=24)
    shards = f"{folder}/shapes-{{00000..00001}}.tar"
    path = folder / "ofa.yaml"
    path.write_text(f"""
run: {{name: plain, dir: {folder}/runs, seed: 3}}
data:
  lanes: 8
  workers: 0
  blend:
    - {{name: pairs, shards: "{shards}", weight: 2, instruction: {{ofa: {{tasks: [caption, match]}}}}}}
    - {{name: texts, shards: "{shards}", weight: 0.5, part: 1, image_size: 32, reader: {{text: {{}}}},
       instruction: {{ofa: {{tasks: [infill_text]}}}}}}
    - {{name: images, shards: "{shards}", weight: 0.25, part: 1, image_size: 32, reader: {{codes: {{}}}},
       instruction: {{ofa: {{tasks: [infill_image]}}}}}}
    - {{name: objects, shards: "{shards}", weight: 0.25, part: 1, image_size: 32,
       reader: {{detection: {{objects: null}}}},
       instruction: {{ofa: {{tasks: [detect], boxes: {{bins: 20, divisor: null}}}}}}}}
model:
  {{name: ofa, width: 16, hidden: 32, heads: 2, encoder_layers: 1, decoder_layers: 1, stem: [1, 1, 1], stem_width: 4,
   image_size: 64, code_image_size: 16, codes: 8, bins: 20, positions: 64, source_length: 40, target_length: 40,
   token_bucket: 8, image_bucket: 6, batch_norm: frozen, tokenizer: {folder}/tokenizer}}
objectives: {{instruction: {{}}}}
train: {{steps: 6, batch_size: 12}}
optim: {{lr: 1.0e-3, warmup: 1}}
checkpoint: {{every_steps: 3, keep_last: 9}}
monitor: {{log_every: 1, tensorboard: false}}
""")
    return path


def test_four_tasks_resume_bit_for_bit_on_two_ranks(ranks, file):
    runs = file.parent / "runs"
    ranks.run(2, pretrain, file)
    ranks.run(2, pretrain, file, "run.name=further", f"checkpoint.resume={runs}/plain/checkpoints/step-00000003")
    ours, theirs = losses(runs / "further"), losses(runs / "plain")
    assert ours == {step: theirs[step] for step in (4, 5, 6)}
    newest = [checkpoint.read_weights(runs / name / "checkpoints/step-00000006") for name in ("plain", "further")]
    assert newest[0].keys() == newest[1].keys()
    assert all(newest[0][name].equal(newest[1][name]) for name in newest[0])


@pytest.mark.parametrize("words", [("zero.stage=3",), ("train.micro_batch_size=2",)], ids=str)
def test_ranks_stages_and_micro_batches_do_not_change_the_run(ranks, file, words):
    still = ("model.dropout=0", "model.drop_path=0", f"run.name=one-{len(words[0])}")
    ranks.run(1, pretrain, file, *still)
    ranks.run(
        2, pretrain, file, "model.dropout=0", "model.drop_path=0", "run.name=two", "checkpoint.resume=none", *words
    )
    runs = file.parent / "runs"
    assert losses(runs / "two") == pytest.approx(losses(runs / f"one-{len(words[0])}"), rel=1e-4)


def test_what_cannot_be_done_in_two_mini_batches_is_refused_before_weights(file):
    made = config.load(Recipe, file)
    words = recipe.build_tokenizer(made.model)
    assert len(recipe.build_loader(made, words).sources) == 4
    two = config.load(Recipe, file, ["objectives={contrastive: {}}"])
    with pytest.raises(config.ConfigError, match="contrastive compares the rows of a step"):
        recipe.build_loader(two, words)
    fixed = config.load(Recipe, file, ["model={name: vlm}", f"model.tokenizer={file.parent}/tokenizer"])
    with pytest.raises(config.ConfigError, match="vlm reads pictures of 224 pixels alone"):
        recipe.build_loader(fixed, words)
