"""Small real things that tests share: models, batches, shards. Everything is deterministic."""

import json
from pathlib import Path

import torch

from pretrain import dist, pretrained, recipe
from pretrain.batch import Batch, Record
from pretrain.data import synthetic, tokenizer
from pretrain.models import base as models
from pretrain.models import text, vision, vlm
from pretrain.pretrained import Pretrained

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


def record(draw: int = 0, **members: object) -> Record:
    """Return a sample of a picture and `members`; what is not bytes is written as json."""
    data = {name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in members.items()}
    return Record("k", "a.tar", {"png": synthetic.sample(0, size=8, seed=0)["png"], **data}, draw=draw)


def corpus(folder: Path, *, shards: int = 2, samples: int = 48) -> Path:
    """Write shards of coloured shapes, classes.json and a tokenizer into `folder` (once), and return it."""
    if not (folder / "classes.json").exists():
        synthetic.write(folder, shards=shards, samples=samples, size=32)
        lines = [f"a picture of one {name} on a plain ground" for name in synthetic.CLASSES]
        tokenizer.train(lines, 600).save(folder / "tokenizer")
        names = [{"name": n, "group": "odd" if i % 2 else "even"} for i, n in enumerate(synthetic.CLASSES)]
        (folder / "classes.json").write_text(json.dumps(names))
    return folder


def recipe_text(folder: Path) -> str:
    """Return a whole pretraining config over `corpus(folder)`, as YAML."""
    shards = f"{folder}/shapes-{{00000..00001}}.tar"
    return f"""
run: {{name: tiny, dir: {folder}/runs, seed: 3}}
data: {{shards: "{shards}", lanes: 8, workers: 0}}
model:
  vision: {{name: test_convnext, image_size: 32}}
  text: {{width: 32, layers: 1, heads: 2, context_length: 16}}
  embed_dim: 16
  tokenizer: {folder}/tokenizer
objectives: {{contrastive: {{}}}}
train: {{steps: 4, batch_size: 16}}
optim: {{lr: 1.0e-3, warmup: 1}}
checkpoint: {{every_steps: 2}}
monitor: {{log_every: 1, tensorboard: false}}
evals:
  zero_shot: {{data: "{shards}", classes: {folder}/classes.json, batch_size: 7}}
  retrieval: {{data: "{shards}", batch_size: 7}}
"""


def config_file(folder: Path) -> Path:
    """Write `recipe_text` over a corpus in `folder` as a file and return it."""
    path = corpus(folder) / "tiny.yaml"
    path.write_text(recipe_text(folder))
    return path


def pretrained_model(section: models.Config, *, seed: int = 0) -> Pretrained:
    """Return a model over a freshly trained BPE of the made-up captions, norms and biases away from one and zero."""
    words = tokenizer.train([f"a picture of one {name} on a plain ground" for name in synthetic.CLASSES], 600)
    words = words.extended(section.symbols)
    if isinstance(section, vlm.Config):
        section.text.vocab_size = None
    torch.manual_seed(seed)
    made = recipe.build_model(section, words)
    state = {n: x + 0.02 * torch.randn_like(x) if x.is_floating_point() else x for n, x in made.state_dict().items()}
    return pretrained.build(section, words, state, source="tests")


def export(folder: Path) -> Path:
    """Write an untrained CLIP-shaped model and its tokenizer as an export of ours (once), and return the folder."""
    from pretrain import recipe
    from pretrain.exports import diptych
    from pretrain.pretrained import build

    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        section = vit_section()
        section.text.context_length, section.text.vocab_size = 40, None
        words = tokenizer.train(["a photo of a red circle", "a picture of one blue square"], 600)
        dist.seed_step(0, "export")
        weights = recipe.build_model(section, words).state_dict()
        diptych.Format().write(build(section, words, weights, source=str(folder)), folder)
    return folder


def class_folders(folder: Path, *, train: int = 6, test: int = 5, colours: int = 3) -> Path:
    """Write `folder`/{train,test}/CLASS/*.png: shapes of some colours (once), and return the folder."""
    if not folder.exists():
        for split, count in (("train", train), ("test", test)):
            for colour in range(colours):
                for number in range(count):
                    # synthetic.CLASSES counts shapes first: six of them a colour
                    index = 48 * (number + 10 * (split == "test")) + 6 * colour + number % 6
                    path = folder / split / f"{synthetic.CLASSES[6 * colour].split()[0]}_shape" / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(synthetic.sample(index, size=32, seed=0)["png"])
    return folder


def pairs(folder: Path, *, train: int = 8, test: int = 15) -> Path:
    """Write `folder`/{train,test}/*.png beside *.txt: shapes with a caption each (once), and return the folder."""
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            path = folder / split / f"{number}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(synthetic.sample(number + 100 * (split == "test"), size=32, seed=0)["png"])
                path.with_suffix(".txt").write_text(f"a picture of {split} {number}")
    return folder
