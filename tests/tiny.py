"""Small real things that tests share: models, batches, shards. Everything is deterministic."""

import torch

from pretrain import dist
from pretrain.batch import Batch
from pretrain.models import text, vision, vlm

VOCABULARY = 64
START, END = VOCABULARY - 2, VOCABULARY - 1


def vit_section(**vision_args: object) -> vlm.Config:
    """Return a CLIP-shaped model of a few thousand parameters."""
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, **vision_args}
    return vlm.Config(
        vision=vision.Config(name="vit_base_patch32_clip_224", image_size=32, args=args),
        text=text.Config(width=32, layers=2, heads=2, context_length=12, vocab_size=VOCABULARY),
        embed_dim=16,
    )


def conv_section() -> vlm.Config:
    """Return a model whose vision tower is a small convolutional net without batch norm."""
    section = vit_section()
    section.vision = vision.Config(name="test_convnext", image_size=32)
    return section


def model(section: vlm.Config | None = None, *, seed: int = 0) -> vlm.VLM:
    """Return a model with weights drawn from `seed`."""
    dist.seed_step(seed, "tiny")
    return vlm.VLM(section or vit_section(), end=END, pad=END)


def batch(rows: int = 6, *, size: int = 32, length: int = 7, seed: int = 0) -> Batch:
    """Return noise pictures with random texts, the last half of the rows one token shorter."""
    draw = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(1, START, (rows, length), generator=draw)
    tokens_BT[:, 0], tokens_BT[:, -1] = START, END
    tokens_BT[rows // 2 :, -2] = END
    return Batch(
        keys=[f"sample-{seed}-{i}" for i in range(rows)],
        image_NCHW=torch.randn(rows, 3, size, size, generator=draw),
        tokens_BT=tokens_BT,
        blocks_BT=torch.ones_like(tokens_BT),
        valid_BT=torch.ones_like(tokens_BT, dtype=torch.bool),
        caption_B=torch.arange(rows) + 1000 * seed,
    )
