"""Whole runs of VL-T5 on made-up pictures: same losses on one and two ranks, resumed, read again, and it writes."""

import shutil
from pathlib import Path

import pytest
import torch

from pretrain import pretrained
from pretrain.batch import Example
from pretrain.models.cache import Cache
from tests import tiny
from tests.end_to_end.jobs import losses_of

pytestmark = pytest.mark.slow

CONFIG = """
run: {{name: vlt5, dir: {folder}/runs, seed: 3}}
data:
  shards: "{folder}/shapes-{{00000..00001}}.tar"
  lanes: 8
  workers: 0
  instruction: {{vlt5: {{tasks: [caption, itm, lm]}}}}
model:
  name: vlt5
  text: {{width: 32, layers: 2, heads: 2, hidden: 48, dropout: 0.0, source_length: 24, target_length: 24}}
  vision:
    source: patch
    tower: {{name: vit_base_patch32_clip_224, image_size: 32,
             args: {{embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8}}}}
  tokenizer: {folder}/tokenizer
objectives: {{instruction: {{reduction: sample}}}}
train: {{steps: 6, batch_size: 16}}
optim: {{lr: 3.0e-3, warmup: 1}}
checkpoint: {{every_steps: 3}}
monitor: {{log_every: 1, tensorboard: false}}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.corpus(tmp_path_factory.mktemp("vlt5"))
    path = folder / "vlt5.yaml"
    path.write_text(CONFIG.format(folder=folder))
    return path


@pytest.mark.parametrize("backbone", ["t5", "bart"])
def test_a_run_is_the_same_on_two_ranks_and_when_it_goes_on(ranks, file: Path, backbone: str) -> None:
    words = (f"model.text.backbone={backbone}",)
    one = losses_of(ranks, 1, file, f"{backbone}-one", *words)
    two = losses_of(ranks, 2, file, f"{backbone}-two", *words, "zero.stage=3", "train.micro_batch_size=4")
    assert one.keys() == two.keys() and all(two[step] == pytest.approx(one[step], rel=2e-4) for step in one)
    assert one[6] < one[1]
    run = file.parent / "runs" / f"{backbone}-two"
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "checkpoints" / "latest").write_text("step-00000003\n")
    again = losses_of(ranks, 2, file, f"{backbone}-two", *words, "zero.stage=2")
    assert all(again[step] == pytest.approx(one[step], rel=2e-4) for step in one)

    found = pretrained.load(run)
    model, composer = found.model, found.composer
    assert model.config.text.vocab_size == found.tokenizer.vocab_size and model.last == found.tokenizer.vocab_size - 1
    picture_HWC = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    batch = composer.collate([composer.row(Example("k", [], prefix="caption:", suffix="a"), [picture_HWC])])
    with torch.no_grad():
        memory = model.remember(batch)
        logits_BUV = model.write(torch.tensor([model.first]), memory, Cache())
        assert torch.allclose(logits_BUV, model(batch).logits_BUV[:, : len(model.first)], atol=1e-6)
    assert batch.decoder_tokens_BU[0, : len(model.first)].tolist() == list(model.first)
    assert batch.decoder_labels_BU[0, len(model.first) - 1] == found.tokenizer.ids("a")[0]
