"""open_clip's own training program, made to run with several ranks on a CPU, where 3.3.0 stops with an error.

Under torchrun, in the peers' environment:
python tests/benchmarks/peer_trainer.py [--batches FOLDER] [--stages FILE] -- ARGUMENTS OF open_clip_train.main

The one thing changed: DistributedDataParallel is not told device_ids=[cpu], which it refuses. `--batches` feeds it
rank-R.safetensors of FOLDER (image_SNCHW, tokens_SBT) instead of its shards; `--stages` puts clocks into it.
Letters: S = steps, N = images, C H W = channels, height, width, B = rows, T = tokens.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from open_clip_train import main as program
from safetensors.torch import load_file

from tests.benchmarks.stages import Stages


class Batches:
    """What open_clip's trainer wants of a data loader, over given batches."""

    def __init__(self, folder: Path, batch_size: int, world: int) -> None:
        self.tensors = load_file(folder / f"rank-{torch_dist.get_rank()}.safetensors")
        self.num_batches = len(self.tensors["tokens_SBT"])
        self.num_samples = self.num_batches * batch_size * world

    def __iter__(self) -> Any:
        return zip(self.tensors["image_SNCHW"], self.tensors["tokens_SBT"])


class Watched:
    """A loader whose batches carry marks."""

    def __init__(self, loader: Any, stages: Stages) -> None:
        self.loader, self.stages = loader, stages
        self.num_batches, self.num_samples = loader.num_batches, loader.num_samples

    def __iter__(self) -> Any:
        return self.stages.data(iter(self.loader))


def on_cpu() -> None:
    """Let the ranks of a CPU be wrapped."""
    wrap = torch.nn.parallel.DistributedDataParallel

    def wrapped(model: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return wrap(model, device_ids=None if device_ids[0].type == "cpu" else device_ids, **kwargs)

    torch.nn.parallel.DistributedDataParallel = wrapped


def given_batches(folder: Path) -> None:
    """Replace the data."""

    def get_data(args: Any, *_: Any, **__: Any) -> Any:
        from open_clip_train.data import DataInfo

        return {"train": DataInfo(Batches(folder, args.batch_size, args.world_size))}

    program.get_data = get_data


def with_clocks(stages: Stages) -> None:
    """Put marks around towers, loss and data."""
    build, data, wrap = program.create_model_and_transforms, program.get_data, torch.nn.parallel.DistributedDataParallel

    def create(*args: Any, **kwargs: Any) -> Any:
        model, *rest = build(*args, **kwargs)
        model.encode_image = stages.tower("image", model.encode_image, lambda out: out)
        model.encode_text = stages.tower("text", model.encode_text, lambda out: out)
        return (model, *rest)

    def get_data(*args: Any, **kwargs: Any) -> Any:
        found = data(*args, **kwargs)
        found["train"].dataloader = Watched(found["train"].dataloader, stages)
        return found

    @functools.wraps(wrap)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        model = wrap(*args, **kwargs)
        model.register_comm_hook(None, stages.reducer)
        return model

    program.create_model_and_transforms, program.get_data = create, get_data
    torch.nn.parallel.DistributedDataParallel = wrapped
    stages.backward()
    stages.collectives()


def main() -> None:
    """Patch as told, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=Path)
    parser.add_argument("--stages", type=Path)
    cut = sys.argv.index("--")
    args = parser.parse_args(sys.argv[1:cut])
    on_cpu()
    if args.batches:
        given_batches(args.batches)
    if args.stages:
        with_clocks(Stages(args.stages))
    program.main(sys.argv[cut + 1 :])


if __name__ == "__main__":
    main()
