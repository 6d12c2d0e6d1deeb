"""Tiny models that fuse, and batches for them."""

import torch

from pretrain import dist
from pretrain.batch import Batch
from pretrain.models import base, coca, fused_vlm, fusion, text, vision, vlm

VOCABULARY = 40
START, END, MASK = VOCABULARY - 3, VOCABULARY - 2, VOCABULARY - 1
WORDS = base.Vocabulary(VOCABULARY, end=END, pad=END, start=START, mask=MASK)
KINDS = ("cross", "joint")


def section(kind: str = "cross", **keys: object) -> vlm.Config:
    """Return a model of a few thousand parameters; `coca` is a kind too."""
    towers = {
        "vision": vision.Config(
            name="vit_base_patch32_clip_224",
            image_size=16,
            args={"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
        ),
        "text": text.Config(width=16, layers=2, heads=2, context_length=16),
        "embed_dim": 8,
        "logit_scale": 0.5,
    }
    if kind == "coca":
        return coca.Config(**towers, fusion=fusion.Config(layers=2, **keys), queries=3, pool_heads=2)
    return vlm.Config(**towers, fusion=fusion.Config(kind=kind, layers=3, **keys))


def model(kind: str = "cross", *, seed: int = 0, **keys: object) -> fused_vlm.FusedVLM:
    """Return a model in float64 with weights drawn from `seed`, large enough for attention to matter."""
    dist.seed_step(seed, "fused")
    made = (coca.CoCa if kind == "coca" else fused_vlm.FusedVLM).build(section(kind, **keys), WORDS).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
        made.logit_scale.fill_(0.5)
    return made


def batch(rows: int = 4, *, length: int = 9, seed: int = 0, shortest: int = 4) -> Batch:
    """Return noise pictures with random texts between start and end, of lengths from `shortest` to `length`."""
    draw = torch.Generator().manual_seed(seed)
    lengths_B = torch.linspace(length, shortest, rows).round().long()
    tokens_BT = torch.randint(1, START, (rows, length), generator=draw)
    place_T = torch.arange(length)
    tokens_BT[place_T >= lengths_B[:, None] - 1] = END
    tokens_BT[:, 0] = START
    valid_BT = place_T < lengths_B[:, None]
    labels_BT = torch.where(valid_BT & (place_T > 0), tokens_BT, -100)
    return Batch(
        keys=[f"sample-{seed}-{i}" for i in range(rows)],
        image_NCHW=torch.randn(rows, 3, 16, 16, generator=draw, dtype=torch.double),
        owner_N=torch.arange(rows),
        tokens_BT=tokens_BT,
        blocks_BT=torch.ones_like(tokens_BT),
        valid_BT=valid_BT,
        labels_BT=labels_BT,
        caption_B=torch.arange(rows) + 1000 * seed,
        draw_B=torch.arange(rows) * 7919 + 104729 * seed,
    )


def single(batch: Batch) -> Batch:
    """Return a batch in single precision."""
    assert batch.image_NCHW is not None
    batch.image_NCHW = batch.image_NCHW.float()
    return batch
