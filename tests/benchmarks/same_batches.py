"""The same batches through both trainers, from the same weights: are the losses equal?

Ours runs as ever; its batches, a function of the seed, are worked out here again and given to open_clip's trainer.
Letters: S = steps, N = images, C H W = channels, height, width, B = rows, T = tokens.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pretrain import config
from pretrain.batch import Batch
from pretrain.data.loader import Loader
from pretrain.pretrained import Pretrained
from pretrain.recipe import Recipe
from tests.benchmarks.trainers import Task, read_open_clip, read_ours, run

STEPS = 20
TOLERANCE = 1e-3


def write_batches(task: Task, section: Recipe, start: Pretrained, folder: Path) -> None:
    """Write what each rank of our run will train on, as open_clip takes it: normalised, padded to the full length."""
    for rank in range(task.ranks):
        loader = Loader(
            section.data,
            batch_size=task.batch,
            seed=section.run.seed,
            transform=start.transform,
            composer=start.composer,
            rank=rank,
            world=task.ranks,
        )
        batches = list(islice(loader.iterate(), task.steps))
        tensors = {
            "image_SNCHW": torch.stack([_pixels(batch, start) for batch in batches]),
            "tokens_SBT": torch.stack([_tokens(batch, start) for batch in batches]),
        }
        save_file(tensors, folder / f"rank-{rank}.safetensors")


def _pixels(batch: Batch, start: Pretrained) -> torch.Tensor:
    assert batch.image_NCHW is not None
    return start.model.vision.normalise(batch.image_NCHW).contiguous()


def _tokens(batch: Batch, start: Pretrained) -> torch.Tensor:
    assert batch.tokens_BT is not None
    tokens_BT = batch.tokens_BT
    return F.pad(tokens_BT, (0, start.config.text.context_length - tokens_BT.shape[1]), value=0)


def compare(task: Task, section: Recipe, start: Pretrained, python: str, folder: Path) -> list[tuple[float, float]]:
    """Return the losses of each step: open_clip's, ours."""
    place = folder / "batches"
    place.mkdir()
    settings = [word for word in task.ours(folder / "equal") if word.startswith("data.")]
    section.data = config.load(Recipe, str(task.config), [*task.overrides, *settings]).data
    write_batches(task, section, start, place)
    run(task.ours(folder / "equal"), folder / "equal", ranks=task.ranks, device=task.device)
    ours = read_ours(folder / "equal").losses
    command = task.open_clip(python, folder / "equal", local=False, entry=("--batches", str(place)))
    run(command, folder / "equal", ranks=task.ranks, device=task.device)
    return list(zip(read_open_clip(folder / "equal").losses, ours, strict=True))


def lines(task: Task, section: Recipe, start: Pretrained, python: str, folder: Path) -> list[str]:
    """Return a sentence about the losses of STEPS steps."""
    if task.device == "cuda":
        return []  # bf16 rounds in other places: nothing equal to 1e-3 can be asked for
    found = compare(replace(task, steps=STEPS, workers=0), section, start, python, folder)
    apart = max(abs(theirs - ours) for theirs, ours in found)
    verdict = "equal" if apart <= TOLERANCE else "NOT equal"
    return [
        f"The same {STEPS} batches through both, from the same weights: losses {verdict} to {TOLERANCE:g} "
        f"(largest difference {apart:.1e}; {found[0][0]:.4f} -> {found[-1][0]:.4f}).",
        "",
    ]
