"""Score a fine-tuned run on its task, or on other data: `python -m finetune.evaluate RUN [section.key=value ...]`.

RUN/delta.safetensors goes on the base that it was trained on. Overrides may name other data (task.data=...), whose
classes a method must be able to answer about, or what needs no training (method.wise=0.3). Nothing is added to the run.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from finetune import delta
from finetune.main import Job as Training
from finetune.methods import base as methods
from finetune.recipe import Recipe
from pretrain import command, config, dist
from pretrain.config import ConfigError
from pretrain.engine import process
from pretrain.metrics.interval import Score

EXAMPLE = """examples:
  python -m finetune.evaluate runs/coop
  python -m finetune.evaluate runs/full method.wise=0.3
  python -m finetune.evaluate runs/cocoop task.data=NEW_CLASSES"""


class Job(Training):
    """A run whose method is there already."""

    def __init__(self, run: Path, section: Recipe, device: torch.device, changes: list[str]) -> None:
        self.file, self.changes = run / delta.FILE, changes
        super().__init__(section, device)

    def build(self) -> methods.Method:
        """Return the method as it was saved, with the task's classes."""
        return delta.read(self.file, self.base, changes=self.changes, names=self.splits.names)


def read(run: Path, words: list[str]) -> tuple[Recipe, list[str]]:
    """Return a run's recipe with overrides, and those of them that change its method.

    Raises:
        ConfigError: no fine-tuned run, or one that has not ended.
    """
    for name in ("config.yaml", delta.FILE):
        if not (run / name).is_file():
            raise ConfigError(f"{run}: no {name}; give the folder of a fine-tuned run that has come to its end")
    return config.load(Recipe, run / "config.yaml", words), [word for word in words if word.startswith("method.")]


@contextmanager
def beside(run: Path, section: Recipe) -> Iterator[Recipe]:
    """Yield the recipe with a run folder of its own inside RUN, which is removed; what RUN has drawn is used again."""
    name = dist.broadcast_object(f".evaluate-{os.urandom(4).hex()}")
    folder = run / name
    try:
        if dist.is_main() and (run / "data" / "splits.json").is_file():
            (folder / "data").mkdir(parents=True)
            shutil.copy(run / "data" / "splits.json", folder / "data")
        dist.barrier()
        yield section.model_copy(update={"run": section.run.model_copy(update={"dir": str(run), "name": name})})
        dist.barrier()
    finally:
        if dist.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def evaluate(run: Path, section: Recipe, changes: list[str], *, device: torch.device) -> dict[str, Score]:
    """Return the score of a run, by task and name. All ranks call it."""
    with beside(run, section) as own, torch.no_grad():
        job = Job(run, own, device, changes)
        return {**job.scores(job.module.eval()), **job.open_scores(job.file, changes)}


def main(words: list[str] | None = None) -> int:
    """Print the scores, one a line, with their 95 % intervals."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a fine-tuned run")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the scores to this file too")
    parser.add_argument("override", nargs="*", metavar="section.key=value", help="other data, another base, ...")
    args = parser.parse_intermixed_args(words)

    def score() -> int:
        section, changes = read(args.run, args.override)
        found = evaluate(args.run, section, changes, device=process.setup_process_group())
        if dist.is_main():
            print("\n".join(f"{name} {score} of {score.count}" for name, score in found.items()))
            if args.json:
                args.json.write_text(json.dumps({n: s._asdict() for n, s in found.items()}, indent=1) + "\n")
        return 0

    return command.guarded(score)


if __name__ == "__main__":
    process.leave(main())
