"""Fit an image tokenizer to the pictures of shards: a codebook in whose codes a decoder writes pictures.

    python pretrain/codebook.py SHARDS FOLDER [--kind patch_kmeans] [--middle] [KEY=VALUE ...]

Pictures are squashed to a square, as those are that codes are written of. KEY=VALUE are options of the kind
(pretrain/models/patch_kmeans.py, vqvae.py), data.KEY=VALUE of how shards are read. One process; equal commands give
equal codebooks. `python pretrain/encode.py FOLDER SHARDS --codes OUT.parquet` writes the codes.

Shapes: N = images, C H W = channels, height, width.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor
from tqdm import tqdm

from pretrain import command
from pretrain.config import ConfigError, build, override
from pretrain.data import loader, tokenizer
from pretrain.data.compose import Composer
from pretrain.data.transforms import Augment, Transform
from pretrain.engine import process
from pretrain.models import image_codes
from pretrain.pretrained import hash_of

EXAMPLE = """examples:
  python pretrain/codebook.py 'data/photos/{00000..00011}.tar' codebooks/photos --size 256 --middle codes=512
  python pretrain/codebook.py 'data/photos/{00000..00011}.tar' codebooks/vqvae --kind vqvae --steps 20000 codes=1024"""
STILL = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))


def composer() -> Composer:
    """Return what composes rows that have no text."""
    return Composer(tokenizer.train([], 514), context_length=2)


def transform(size: int) -> Transform:
    """Return what squashes pictures to a square of `size` pixels a side."""
    return Transform(size, resize_mode="squash")


def check_size(size: int, *, middle: bool) -> int:
    """Return how many codes a picture has.

    Raises:
        ConfigError: its side is no whole number of codes.
    """
    step = image_codes.PIXELS * (2 if middle else 1)
    if size < step or size % step:
        raise ConfigError(f"--size {size}: a code is {step} pixels wide of it; give a multiple of {step}")
    return (size // step) ** 2


class Coder:
    """An image tokenizer and how pictures become its inputs: what encode needs of it."""

    def __init__(self, folder: str | Path, *, size: int, middle: bool, device: torch.device | str = "cpu") -> None:
        """Read the folder.

        Raises:
            ConfigError: there is no image tokenizer, or the size is no whole number of codes.
        """
        self.model, self.size, self.middle = image_codes.load(folder, device=device), size, middle
        self.length = check_size(size, middle=middle)
        self.weights_hash = hash_of(self.model.state_dict())
        self.transform, self.composer = transform(size), composer()

    def about(self) -> dict[str, Any]:
        """Return what codes depend on."""
        return {
            "weights": self.weights_hash,
            "codebook_size": self.model.codebook_size,
            "size": self.size,
            "part": "middle" if self.middle else "whole",
        }

    def columns(self, image_NCHW: Tensor) -> dict[str, Tensor]:
        """Return uint16 codes [N, P] of uint8 pictures on the tokenizer's device."""
        image_NCHW = image_codes.in_unit(image_NCHW)
        found_NP = self.model.encode(image_codes.middle(image_NCHW) if self.middle else image_NCHW)
        return {"codes": found_NP.cpu().to(torch.uint16)}


def batches(
    data: loader.Config, *, size: int, middle: bool, batch_size: int, steps: int, seed: int
) -> Iterator[Tensor]:
    """Yield `steps` batches of pictures [N, 3, H, W] in [-1, 1], drawn as for training, unchanged."""
    opened = loader.Loader(
        data.model_copy(update={"augment": STILL}),
        batch_size=batch_size,
        seed=seed,
        transform=transform(size),
        composer=composer(),
        rank=0,
        world=1,
    )
    endless = opened.iterate()
    for _ in tqdm(range(steps), desc="fitting", unit="batch", delay=3):
        image_NCHW = next(endless).image_NCHW
        assert image_NCHW is not None, "the reader gives a picture a row"
        yield image_codes.in_unit(image_codes.middle(image_NCHW) if middle else image_NCHW)


def main(words: list[str] | None = None) -> int:
    """Fit as the command line says; return the exit code."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("shards", metavar="SHARDS", help="as data.shards: paths with braces")
    parser.add_argument("out", metavar="FOLDER", type=Path, help="where the image tokenizer is written")
    parser.add_argument("option", nargs="*", metavar="KEY=VALUE", help="options of the kind, and data.KEY=VALUE")
    parser.add_argument("--kind", default="patch_kmeans", help=", ".join(image_codes.KINDS))
    parser.add_argument("--size", type=int, default=256, help="pixels a side to which pictures are squashed")
    parser.add_argument(
        "--middle", action="store_true", help="only the middle half of each side, as infilling writes it"
    )
    parser.add_argument("--steps", type=int, default=200, help="batches")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures of a batch")
    args = parser.parse_intermixed_args(words)
    if args.steps < 1 or args.batch_size < 1:
        parser.error("--steps and --batch-size must be at least 1")

    def run() -> int:
        module = image_codes.module_of(args.kind)
        tree = override({}, args.option)
        data = build(
            loader.Config, {"reader": {"picture": {}}, **tree.pop("data", {}), "shards": args.shards}, where="data"
        )
        made = module.Tokenizer(build(module.Config, tree, where=args.kind))
        check_size(args.size, middle=args.middle)
        if torch.cuda.is_available():
            made.cuda()
        device = next(iter(made.state_dict().values())).device
        pictures = batches(
            data, size=args.size, middle=args.middle, batch_size=args.batch_size, steps=args.steps,
            seed=made.config.seed,
        )  # fmt: skip
        told = made.fit(picture.to(device) for picture in pictures)
        image_codes.save(made, args.out)
        print(
            f"{args.out}: {made.codebook_size} codes; "
            + ", ".join(f"{name} {value:.4g}" for name, value in told.items())
        )
        return 0

    return command.guarded(run)


if __name__ == "__main__":
    process.leave(main())
