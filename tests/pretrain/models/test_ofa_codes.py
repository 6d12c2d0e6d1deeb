"""A small OFA learns to fill in the middle of pictures by codes of an image tokenizer; a run of it is read again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pretrain import pretrained
from pretrain.batch import Batch
from pretrain.models import image_codes, ofa
from pretrain.models.cache import Cache
from tests import tiny
from tests.end_to_end.jobs import losses, pretrain
from tests.pretrain.models import test_image_codes, test_ofa

ROWS = 6


def infilling(tokenizer: image_codes.ImageTokenizer) -> Batch:
    """Return pictures whose middle is hidden, and its codes as what the decoder reads; the end token comes last."""
    seen = test_image_codes.pictures(ROWS, size=64, first=40)
    codes_NP = tokenizer.encode(image_codes.middle(seen)) + test_ofa.TEXT
    start = torch.zeros(ROWS, 1, dtype=torch.long)
    return Batch(
        keys=[str(n) for n in range(ROWS)],
        image_NCHW=seen,
        owner_N=torch.arange(ROWS),
        hole_N=torch.ones(ROWS, dtype=torch.bool),
        tokens_BT=torch.full((ROWS, 3), 5),
        valid_BT=torch.ones(ROWS, 3, dtype=torch.bool),
        decoder_tokens_BU=torch.cat([start, codes_NP], 1),
        decoder_labels_BU=torch.cat([codes_NP, start + test_ofa.WORDS.end], 1),
        codes_B=torch.ones(ROWS, dtype=torch.bool),
        draw_B=torch.arange(ROWS),
    )


def loss_of(made: ofa.OFA, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(made(batch).logits_BUV.transpose(1, 2), batch.decoder_labels_BU)


@pytest.mark.slow
def test_the_middle_is_learned_by_heart() -> None:
    tokenizer = test_image_codes.fitted("patch_kmeans", codes=test_ofa.CODES)
    given = infilling(tokenizer)
    section = test_ofa.section(width=32, hidden=64, dropout=0.0, drop_path=0.0, batch_norm="frozen")
    torch.manual_seed(0)
    made = ofa.OFA.build(section, test_ofa.WORDS).train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss_of(made, given).backward()
        optimizer.step()
    made.eval()
    with torch.no_grad():
        learned = loss_of(made, given)
        assert learned < 0.05
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        shuffled = given.decoder_labels_BU[:, :16][:, order]
        start = given.decoder_tokens_BU[:, :1]
        wrong = replace(given, decoder_tokens_BU=torch.cat([start, shuffled], 1),
                        decoder_labels_BU=torch.cat([shuffled, given.decoder_labels_BU[:, -1:]], 1))  # fmt: skip
        assert loss_of(made, wrong) > 10 * learned
        hidden = given.image_NCHW.clone()
        hidden[:, :, 16:48, 16:48] = 0.3
        assert torch.equal(loss_of(made, replace(given, image_NCHW=hidden)), learned), "it has not seen the middle"

        memory, cache, said = made.remember(given), Cache(), [given.decoder_tokens_BU[:, :1]]
        for _ in range(16):
            said.append(made.write(said[-1], memory, cache)[:, -1:].argmax(-1))
    written = torch.cat(said[1:], 1)
    assert torch.equal(written, given.decoder_labels_BU[:, :16])
    picture = tokenizer.decode(written - test_ofa.TEXT)
    assert torch.equal(tokenizer.encode(picture), written - test_ofa.TEXT)


@pytest.mark.slow
def test_a_run_is_read_again(ranks, tmp_path: Path) -> None:
    """Two mini-batches a step, captions and infilled texts, on two ranks at stage 3; the checkpoint is a model."""
    folder = tiny.corpus(tmp_path)
    shards = f"{folder}/shapes-{{00000..00001}}.tar"
    section = test_ofa.section(
        source_length=40, target_length=40, positions=64, batch_norm="sync", name="ofa", sample_patches=9
    )
    path = tmp_path / "ofa.yaml"
    path.write_text(
        f"""
run: {{name: ofa, dir: {folder}/runs}}
data:
  lanes: 8
  workers: 0
  blend:
    - {{name: captions, shards: "{shards}", instruction: {{ofa: {{tasks: [caption, match]}}}}, weight: 1}}
    - {{name: texts, shards: "{shards}", reader: {{infill: {{}}}}, part: 1, weight: 1}}
model: {{{", ".join(f"{k}: {v if v is not None else 'null'}" for k, v in section.model_dump(mode="json").items())}}}
objectives: {{instruction: {{}}}}
train: {{steps: 3, batch_size: 8}}
optim: {{lr: 1.0e-3, warmup: 1}}
zero: {{stage: 3}}
checkpoint: {{every_steps: 3}}
monitor: {{log_every: 1, tensorboard: false}}
""".replace("tokenizer: clip", f"tokenizer: {folder}/tokenizer").replace("False", "false")
    )
    ranks.run(2, pretrain, path, timeout=300)
    run = folder / "runs" / "ofa"
    assert set(losses(run)) >= {1, 2, 3}
    found = pretrained.load(run)
    assert isinstance(found.model, ofa.OFA) and found.config.sample_patches is None
    assert found.tokenizer.symbol("<bin_9>") == found.model.embed_tokens.num_embeddings - 1
