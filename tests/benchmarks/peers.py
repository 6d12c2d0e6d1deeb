"""The peers, as their users run them: contestants of the race in data.py, in an environment of their own.

python tests/benchmarks/peers.py open_clip|webdataset SHARDS
"""

import itertools
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
import webdataset
from race import contest

BATCH = 64


def open_clip(shards: str) -> Callable[[], int]:
    """Return a lap of four batches of open_clip's training data, by its own functions, without worker processes."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    args = SimpleNamespace(
        train_data=shards, train_num_samples=1 << 24, train_data_upsampling_factors=None, dataset_resampled=True,
        seed=0, batch_size=BATCH, workers=0, world_size=1,
    )  # fmt: skip
    cfg = open_clip.transform.PreprocessCfg(size=224)
    preprocess = open_clip.transform.image_transform_v2(cfg, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    endless = iter(get_wds_dataset(args, preprocess, is_train=True, tokenizer=tokenizer).dataloader)

    def lap() -> int:
        for images, texts in itertools.islice(endless, 4):
            assert images.shape == (BATCH, 3, 224, 224) and texts.shape == (BATCH, 77)
        return 4 * BATCH

    return lap


def plain(shards: str) -> Callable[[], int]:
    """Return a lap of raw samples of webdataset's fluent interface, without decoding."""

    def lap() -> int:
        return sum(
            bool(sample["jpg"] and sample["txt"]) for sample in webdataset.WebDataset(shards, shardshuffle=False)
        )

    return lap


if __name__ == "__main__":
    torch.set_num_threads(1)
    contest({"open_clip": open_clip, "webdataset": plain}[sys.argv[1]](sys.argv[2]))
