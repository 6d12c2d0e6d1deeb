"""VL-T5 and VL-BART of a few thousand parameters, batches for them, and transformers' models of the same sizes."""

import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from pretrain import dist
from pretrain.batch import Batch
from pretrain.losses.tokens import IGNORE, count_B, token_sum
from pretrain.models import base, encoder_decoder, vision, visual_tokens, vlt5
from pretrain.objectives import base as objectives

VOCABULARY, FEATURE = 300, 6
WORDS = base.Vocabulary(VOCABULARY, end=1, pad=0, start=2)
TOWER = vision.Config(name="test_convnext", image_size=64)
PATCHES = vision.Config(
    name="vit_base_patch32_clip_224",
    image_size=32,
    args={"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8},
)


def section(backbone: str = "t5", source: str = "region", *, text: dict | None = None, **keys) -> vlt5.Config:
    """Return sizes; `keys` are more of `vision`, `text` more of `text`."""
    tower = {"region": None, "grid": TOWER, "patch": PATCHES}[source]
    sizes = {"width": 16, "layers": 2, "heads": 2, "hidden": 24, "positions": 30, "vocab_size": VOCABULARY}
    words = encoder_decoder.Config(backbone=backbone, dropout=0.0, **{**sizes, **(text or {})})
    return vlt5.Config(text=words, vision=visual_tokens.Config(source=source, tower=tower, width=FEATURE, **keys))


def model(config: vlt5.Config | None = None, *, seed: int = 0, shaken: bool = True) -> vlt5.VLT5:
    """Return a model in eval mode; shaken: gains, biases and the bias of logits are away from one and zero."""
    dist.seed_step(seed, "tiny")
    made = vlt5.VLT5.build(config or section(), WORDS).eval()
    for tensor in made.state_dict().values() if shaken else ():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn_like(tensor)
    return made


def batch(rows: int = 4, *, seed: int = 0, size: int = 0, regions: tuple[int, ...] = (3, 1, 0, 2)) -> Batch:
    """Return texts of unequal lengths, a decoder's, regions (row i has regions[i % 4]), and pictures of `size` pixels.

    With pictures the third row of each four has none.
    """
    draw = torch.Generator().manual_seed(seed)
    length_B = torch.tensor([7, 4, 6, 2] * rows)[:rows]
    valid_BT = torch.arange(7) < length_B[:, None]
    written_B = torch.tensor([1, 5, 3, 2] * rows)[:rows]
    tokens_BU = torch.randint(3, VOCABULARY, (rows, 6), generator=draw)
    counts = torch.tensor((regions * rows)[:rows])
    owner_K = torch.arange(rows).repeat_interleave(counts)
    corner_K22 = torch.rand(len(owner_K), 2, 2, generator=draw).sort(1).values
    owner_N = torch.tensor([row for row in range(rows) if row % 4 != 2])
    labels_BU = tokens_BU[:, 1:].masked_fill(torch.arange(5) >= written_B[:, None], IGNORE)
    return Batch(
        keys=[f"{seed}-{row}" for row in range(rows)],
        tokens_BT=torch.randint(3, VOCABULARY, (rows, 7), generator=draw).masked_fill(~valid_BT, 0),
        valid_BT=valid_BT,
        decoder_tokens_BU=tokens_BU[:, :5],
        decoder_labels_BU=labels_BU,
        region_KC=torch.randn(len(owner_K), FEATURE, generator=draw),
        boxes_K4=corner_K22.flatten(1),
        box_owner_K=owner_K,
        image_NCHW=torch.randn(len(owner_N), 3, size, size, generator=draw) if size else None,
        owner_N=owner_N if size else None,
    )


def theirs(backbone: str) -> T5ForConditionalGeneration | BartForConditionalGeneration:
    """Return transformers' model of the same sizes, with random weights."""
    torch.manual_seed(1)
    if backbone == "t5":
        sizes = {"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        made = T5ForConditionalGeneration(
            T5Config(vocab_size=VOCABULARY, d_model=16, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
        )
    else:
        halves = {
            f"{half}_{name}": value
            for half in ("encoder", "decoder")
            for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
        }
        made = BartForConditionalGeneration(
            BartConfig(vocab_size=VOCABULARY, d_model=16, max_position_embeddings=30, **halves)
        )
        made.final_logits_bias.normal_()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


class Says(objectives.Objective):
    """The mean cross-entropy of what the decoder says, over all tokens of the step."""

    needs = ("seq2seq",)

    def prepare(self, batch: Batch, step: int) -> objectives.Prepared:
        """Count tokens."""
        return objectives.Prepared({}, count_B(batch.decoder_labels_BU).sum().float())

    def forward(self, encodings: vlt5.Encodings, prepared: objectives.Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum divided by the count."""
        loss_B = token_sum(encodings.logits_BUV, encodings.batch.decoder_labels_BU)
        return loss_B.sum() / prepared.count, {}


def mixture(made: vlt5.VLT5) -> objectives.Mixture:
    """Return the model with an objective around it."""
    return objectives.Mixture(made, {"says": Says(objectives.Config())})
