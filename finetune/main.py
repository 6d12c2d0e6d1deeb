"""Fine-tune a pretrained model: `deepspeed finetune/main.py --config FILE base=EXPORT [section.key=value ...]`.

Reads as the recipe: base model, task and method become one module, the trainer of pretraining does the rest.
Interrupted, the same command goes on where it stopped. RUN/delta.safetensors holds what was trained.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started as a file, the folder of this file would come first and hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from finetune import delta, recipe
from finetune.contrast import Contrast
from finetune.methods import base as methods
from finetune.methods.base import Finetune
from finetune.reading import Reading
from finetune.recipe import Recipe
from finetune.sources import SPLITS
from finetune.splits import Splits
from finetune.tasks import base as tasks
from pretrain import command, config, dist, pretrained, registry
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.data import loader
from pretrain.data.quarantine import Quarantine
from pretrain.engine import optim, process
from pretrain.engine.parts import Data, Identity
from pretrain.engine.run_folder import RunFolder
from pretrain.engine.trainer import Trainer
from pretrain.engine.zero import Engine
from pretrain.evals.base import Features
from pretrain.evals.zero_shot import class_weights
from pretrain.metrics.interval import Score
from pretrain.pretrained import Pretrained
from pretrain.report import scores

EXAMPLE = """example:
  deepspeed --num_gpus 2 finetune/main.py --config finetune/configs/coop.yaml base=runs/clip_iconcaps/export
one's own pictures, FOLDER/CLASS/*.jpg (finetune/sources.py has more forms):
  python finetune/main.py --config finetune/configs/linear_probe.yaml base=EXPORT task.data=FOLDER"""

Load = Callable[[str], Pretrained]


class Job:
    """The parts of one fine-tuning run."""

    def __init__(self, section: Recipe, device: torch.device, load: Load = pretrained.load) -> None:
        """Build the parts; `load` gives a base of one's own, which will be changed. All ranks call it.

        Raises:
            ConfigError: parts that do not fit together; what can be told from the config is, before weights are read.
        """
        self.recipe, self.device, self._load = section, device, load
        self.base: Pretrained = load(section.base)
        methods.refuse_base(section.method.name, self.base.config)
        self.folder = RunFolder(section.run.folder, config=config.dump(section))
        self.task: tasks.Task = registry.find("finetune.tasks", section.task.name).Task(section.task)
        self.splits: Splits = self.task.prepare(self.folder.path / "data")
        dist.seed_step(section.run.seed, "method")  # the same first weights on every rank
        self.method = self.build()
        self.module: torch.nn.Module = Finetune(self.method).to(device)
        pictures_by = self.method.pictures_by
        if self.task.kind == "retrieve":
            self.module, pictures_by = Contrast(self.method), "pixels"  # tables hold classes and no captions
        self.reading = Reading(section, self.task, self.base, pictures_by=pictures_by, device=device)
        for shards in self.shards().values():
            self.reading.encode(shards)

    def build(self) -> methods.Method:
        """Return the method as it is before training.

        Raises:
            ConfigError: it needs a split that the data lacks, or cannot be built on this base.
        """
        name = self.recipe.method.name
        plug = registry.find("finetune.methods", name)
        for split in plug.Method.splits(self.recipe.method):
            if not getattr(self.splits, split):
                raise ConfigError(
                    f"task.data: has no {split} split, and too few samples to take one from train; "
                    f"method.name={name} needs one as it is configured"
                )
        method: methods.Method = plug.Method(self.recipe.method, self.base, self.splits.names)
        return method

    def read(self, split: str, *, views: int = 0) -> Iterator[Batch]:
        """Return this rank's part of a split, in order, on the device; all ranks get equally many batches.

        With `views`, so many passes one after the other, augmented as training is.
        """
        return self.reading.scan(self.shards()[split], split, views=views)

    def shards(self) -> dict[str, list[str]]:
        """Return the shards of every split, and of what is scored beside test."""
        more = {name: part.shards for name, part in self.splits.more.items()}
        return {**{split: getattr(self.splits, split) for split in SPLITS}, **more}

    def zero_shot(self) -> dict[str, Score]:
        """Return the scores of the base as it is, with the task's sentences."""
        model = self.base.model.eval()
        features = self._features(lambda batch, want: getattr(model(batch), want))
        if self.task.kind == "retrieve":
            return self._named(zero_shot=True, scores=self.task.scores(features, self.read("test"), []))
        task, found = self.recipe.task, {}
        for part, names in self.parts().items():
            weight_KE = class_weights(features, names, task.templates, batch_size=task.batch_size)
            with torch.no_grad():
                scores_ = self.task.scores(
                    lambda b, weight_KE=weight_KE: model(b).image @ weight_KE.T, self.read(part), names
                )
            found |= self._named(part, zero_shot=True, scores=scores_)
        return found

    def parts(self) -> dict[str, list[str]]:
        """Return what is scored, test first, and the class names of each."""
        return {"test": self.splits.names, **{name: part.names for name, part in self.splits.more.items()}}

    def scores(self, module: torch.nn.Module) -> dict[str, Score]:
        """Return the scores of a fine-tuned model on every split that has the classes of its training."""
        own = [part for part, names in self.parts().items() if names == self.splits.names]
        return {name: score for part in own for name, score in self.score(module, part).items()}

    def open_scores(self, file: Path, changes: Iterable[str] = ()) -> dict[str, Score]:
        """Return the scores of a saved delta on splits of classes that it was not trained on, where it names any."""
        found: dict[str, Score] = {}
        others = {part: names for part, names in self.parts().items() if names != self.splits.names}
        for part, names in others.items() if self.method.open_classes else ():
            method = delta.read(file, self._load(self.recipe.base), changes=changes, names=names)
            with torch.no_grad():
                found |= self.score(Finetune(method).to(self.device).eval(), part)
        return found

    def score(self, module: torch.nn.Module, part: str = "test") -> dict[str, Score]:
        """Return the scores of a fine-tuned model on the whole of a split."""
        answer: Any = lambda b: module([b], want="logits")  # noqa: E731
        if self.task.kind == "retrieve":
            answer = self._features(lambda batch, want: module([batch], want=want))
        return self._named(part, scores=self.task.scores(answer, self.read(part), self.parts()[part]))

    def _features(self, run: Callable[[Batch, str], Tensor]) -> Features:
        return Features(run=run, transform=self.base.transform, composer=self.base.composer, device=self.device)

    def _named(self, part: str = "test", *, scores: dict[str, Score], zero_shot: bool = False) -> dict[str, Score]:
        """Return scores under the names of evals.jsonl: TASK/[PART/][zero_shot/]METRIC."""
        lead = [self.recipe.task.name, *([part] if part != "test" else [])]
        if zero_shot and list(scores) == [self.task.metric]:
            return {"/".join([*lead, "zero_shot"]): score for score in scores.values()}
        lead += ["zero_shot"] if zero_shot else []
        return {"/".join([*lead, name]): score for name, score in scores.items()}

    def training(self) -> loader.Loader:
        """Return the training batches of this rank."""
        return self.reading.training(self.splits.train)

    def identity(self, batches: loader.Loader) -> Identity:
        """Return what a checkpoint of this run belongs to."""
        tree = self.recipe.model_dump(mode="json", include={"method", "train", "optim", "ema"})
        about = {"base": self.base.weights_hash, "method": tree.pop("method"), "classes": self.splits.names}
        drawn = self.recipe.task.model_dump(mode="json", include={"seed", "shots"})  # other samples, as many of them
        order = {**batches.fingerprint(), "task": drawn, "train": contents(batches)}
        return Identity(fingerprint={"order": order, "architecture": about}, optimisation=tree)


def contents(batches: loader.Loader) -> str:
    """Return a hash of the keys and sizes of all that training reads."""
    out = hashlib.blake2b(digest_size=8)
    for catalog in (source.store.catalog for source in batches.sources):
        for shard in range(len(catalog.paths)):
            out.update(catalog.index(shard))
    return out.hexdigest()


def run(section: Recipe, device: torch.device, load: Load = pretrained.load) -> int:
    """Fine-tune as the recipe says; return the exit code. All ranks call it."""
    job = Job(section, device, load)
    if job.reading.note:
        print_once(job.reading.note)
    before = job.zero_shot()
    if job.method.solved(section.method):
        job.folder.claim()
        print_once(json.dumps(job.method.fit(job.read)))
        return finish(job, before, steps=0)
    with torch.no_grad():
        job.method.eval().prepare(job.read)
    job.module.train()  # all of it: the scores of the base have left its towers in eval mode
    batches = job.training()
    train = section.train
    assert train is not None
    section.optim.epoch_steps = batches.samples_per_epoch / train.batch_size
    quarantine = Quarantine(
        job.folder.path / "quarantine.jsonl", section.data.max_bad_fraction, check=job.folder.check_token
    )

    def on_bad(batch: Batch, step: int) -> None:
        quarantine.add(batch.bad)
        quarantine.sync(seen=(step + 1) * train.batch_size, device=device)

    steps = train.total_steps(batches.samples_per_epoch)
    warn(section, steps)
    trainer = Trainer(
        job.module,
        section,
        folder=job.folder,
        data=Data(
            batches=batches.iterate,
            state=batches.state,
            restore=batches.restore,
            exclude=lambda numbers: batches.exclude(batches=numbers),
            batch_at=lambda step: batches.excluded.batch_at(step),
            on_bad=on_bad,
        ),
        steps=steps,
        device=device,
        seed=section.run.seed,
        identity=job.identity(batches),
        average=section.ema,
    )
    code = trainer.run() or finish(job, before, steps=steps, trainer=trainer)
    trainer.close()
    return code


def finish(job: Job, before: dict[str, Score], *, steps: int, trainer: Trainer | None = None) -> int:
    """Score, save the delta and say the result; return the exit code."""
    if trainer is None:
        with torch.no_grad():
            state, after = job.method.state(), job.scores(job.module.eval())
    else:
        state, after = settled(job, trainer.engine)
    path = job.folder.path / delta.FILE
    if dist.is_main():
        about = {"pretrained": job.base, "method": job.method.config, "names": job.splits.names}
        delta.write(path, state, **about, check=job.folder.check_token)
    dist.barrier()
    after |= job.open_scores(path)
    if dist.is_main():
        scores.append(job.folder.path, steps, {**before, **after}, check=job.folder.check_token)
    numbers = sum(state[name].numel() for name in job.method.trained())
    (name, now), then = next(iter(after.items())), next(iter(before.values()))
    print_once(
        f"{job.recipe.method.name} on {job.recipe.task.name} ({len(job.splits.names)} classes, "
        f"{job.splits.samples['train']} samples, {numbers:,} parameters): "
        f"test {name.removeprefix(job.recipe.task.name + '/')} {now}, zero-shot {then}"
    )
    return 0


def settled(job: Job, engine: Engine) -> tuple[dict[str, Tensor], dict[str, Score]]:
    """Return what was trained, of a run with `ema` its average, and its scores; the method settles in between."""
    import deepspeed

    same_buffers(job.method)
    trained = list(job.method.trained().values())
    with engine.averaged():
        with engine.gathered(trained):
            state = {name: x.detach().cpu().clone() for name, x in job.method.state().items()}
        with torch.no_grad(), deepspeed.zero.GatheredParameters(trained, modifier_rank=0, enabled=engine.stage == 3):
            job.method.settle()
        with engine.evaluating() as module:
            if chosen := job.method.choose(job.read):
                print_once(json.dumps(chosen))
            return state, job.scores(module)


def same_buffers(method: methods.Method) -> None:
    """Give all ranks the first one's running statistics, which a delta holds: they then answer alike."""
    parameters = method.trained()
    own = {name: x for name, x in method.state().items() if name not in parameters}
    for name, x in dist.broadcast_object({name: x.cpu() for name, x in own.items()}).items():
        own[name].copy_(x)


def warn(section: Recipe, steps: int) -> None:
    """Say what runs, yet belongs to another kind of run."""
    assert section.train is not None
    plug = registry.find("finetune.methods", section.method.name)
    found = optim.warnings(section.optim, steps=steps, batch_size=section.train.batch_size, from_scratch=False)
    for line in (*found, *methods.warnings(plug.Method, section.optim)):
        if dist.is_main():
            print(f"warning: {line}", file=sys.stderr, flush=True)


def print_once(line: str) -> None:
    """Print a line on rank 0."""
    if dist.is_main():
        print(line, flush=True)


def main(words: list[str] | None = None) -> int:
    """Read the command line and fine-tune; return the exit code."""
    parser = command.training_parser(__doc__, EXAMPLE)
    args = parser.parse_intermixed_args(words)
    if args.schema:
        print(json.dumps(recipe.schema(), indent=1))
        return 0
    if not args.config:
        parser.error("--config FILE is needed")

    def tune() -> int:
        section = config.load(Recipe, args.config, args.override)
        if args.print_config:
            print(config.dump(section))
            return 0
        return run(section, process.setup_process_group())

    return command.guarded(tune)


if __name__ == "__main__":
    process.leave(main())
