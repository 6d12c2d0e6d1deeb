"""Pretrain a vision-language model: `deepspeed pretrain/main.py --config FILE [section.key=value ...]`.

Reads as the recipe: build the parts, hand them to the trainer. Runs under deepspeed, torchrun, srun or plain python;
interrupted, the same command goes on where it stopped.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # started as a file, the folder of this file would come first and hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from pretrain import command, config, dist, plan, registry
from pretrain import recipe as recipes
from pretrain.batch import Batch
from pretrain.data.format import write_atomic
from pretrain.data.quarantine import Quarantine
from pretrain.engine import peak, process, profile
from pretrain.engine.monitor import Speed
from pretrain.engine.parts import Data, Hook, Identity
from pretrain.engine.run_folder import RunFolder
from pretrain.engine.trainer import Trainer
from pretrain.evals.base import Features
from pretrain.objectives.base import Mixture
from pretrain.planning import memory
from pretrain.recipe import Recipe
from pretrain.report import scores, write

EXAMPLE = """example:
  deepspeed --num_gpus 2 pretrain/main.py --config pretrain/configs/clip_iconcaps.yaml train.steps=200 zero.stage=2"""


def train(recipe: Recipe, device: torch.device, *, planned: plan.Plan | None = None) -> int:
    """Train as the recipe says; return the exit code. All ranks call it; rank 0 may have `planned` the run."""
    words = recipes.build_tokenizer(recipe.model)
    loader = recipes.build_loader(recipe, words)
    mixture, record = recipes.build_for_training(recipe, words)
    folder = RunFolder(recipe.run.folder, config=config.dump(recipe))
    if dist.is_main():
        words.save(folder.path / "tokenizer")  # a run stays usable when the corpus is gone
    stream = recipe.data.order == "stream"  # its batches have no numbers
    quarantine = Quarantine(folder.path / "quarantine.jsonl", recipe.data.max_bad_fraction, check=folder.check_token)

    def on_bad(batch: Batch, step: int) -> None:
        quarantine.add(batch.bad)
        quarantine.sync(seen=(step + 1) * recipe.train.batch_size, device=device)

    steps = recipe.train.total_steps(loader.samples_per_epoch)

    def batches(first: int) -> Iterator[Batch]:
        return profile.windowed(loader.iterate(first), recipe.profile, folder.path, first=first)

    trainer = Trainer(
        mixture,
        recipe,
        folder=folder,
        data=Data(
            batches=batches,
            state=loader.state,
            restore=loader.restore,
            exclude=None if stream else lambda batches: loader.exclude(batches=batches),
            batch_at=(lambda step: step) if stream else lambda step: loader.excluded.batch_at(step),
            on_bad=on_bad,
        ),
        steps=steps,
        device=device,
        seed=recipe.run.seed,
        identity=Identity(
            fingerprint={"order": loader.fingerprint(), "architecture": recipes.architecture(recipe, words)},
            optimisation=recipe.model_dump(mode="json", include={"train", "optim", "ema"}),
        ),
        average=recipe.ema,
        record=record,
        speed=Speed(planned.step.flops, peak.of(device, recipe.train.precision)) if planned else None,
        hooks=eval_hooks(recipe, mixture, folder, steps=steps, words=words, device=device),
    )
    if planned:
        write_atomic(folder.path / "plan.json", json.dumps(planned.tree(), indent=1).encode())
    code = trainer.run()
    if dist.is_main():
        write.write(folder.path, check=folder.check_token)  # the last line of metrics.jsonl came after the last eval
    return code


def announce(recipe: Recipe, device: torch.device) -> plan.Plan | None:
    """Say that the ranks are there and what the run will need; return the plan, None where the step is beyond it."""
    ranks = dist.world()
    print(f"{recipe.run.name}: {ranks} {'rank is' if ranks == 1 else 'ranks are'} up, on {device.type}", flush=True)
    try:
        cpu = device.type != "cuda"
        limit = None if cpu else torch.cuda.get_device_properties(device).total_memory / memory.GIB
        name = None if cpu else torch.cuda.get_device_name(device)
        nodes = max(1, ranks // process.place(os.environ).local_world)
        found = plan.resolve(recipe, plan.Machines(ranks, nodes, cpu, name, limit))
    except (RuntimeError, NotImplementedError) as error:  # an operator that fake tensors do not know
        print(f"warning: the run cannot be planned, so there is no MFU: {error}", file=sys.stderr, flush=True)
        return None
    print(found.text(), flush=True)
    return found


def eval_hooks(
    recipe: Recipe, mixture: Mixture, folder: RunFolder, *, steps: int, words: recipes.Tokenizer, device: torch.device
) -> list[Hook]:
    """Return one hook an eval: all ranks score together, rank 0 writes evals.jsonl."""
    features = Features(
        run=lambda batch, want: mixture([batch], want=want),
        transform=recipes.build_transform(recipe.model),
        composer=recipes.build_composer(recipe.model, words),
        device=device,
    )

    def hook(name: str, section: recipes.EvalConfig) -> Hook:
        scorer = registry.find("pretrain.evals", name).Eval(section)

        def call(done: int) -> None:
            found = {f"{name}/{key}": score for key, score in scorer.run(features).items()}
            if dist.is_main():
                scores.append(folder.path, done, found, check=folder.check_token)
                if scorer.examples is not None:
                    tree = {"step": done, **scorer.examples}
                    write_atomic(folder.path / f"{name}.json", json.dumps(tree).encode(), check=folder.check_token)
                write.write(folder.path, check=folder.check_token)
                print("\n".join(f"step {done}: {key} {score}" for key, score in found.items()), flush=True)

        return Hook(call, every=section.every_steps or steps)

    return [hook(name, section) for name, section in recipe.evals.items()]


def main(words: list[str] | None = None) -> int:
    """Read the command line and train; return the exit code."""
    parser = command.training_parser(__doc__, EXAMPLE)
    parser.add_argument("--plan", action="store_true", help="print memory, steps and time, build nothing, and stop")
    plan.add_arguments(parser)
    args = parser.parse_intermixed_args(words)
    if args.schema:
        print(json.dumps(recipes.schema(), indent=1))
        return 0
    if not args.config:
        parser.error("--config FILE is needed")

    def run() -> int:
        recipe = config.load(Recipe, args.config, args.override)
        if args.print_config:
            print(config.dump(recipe))
            return 0
        if args.plan:
            return plan.show(recipe, args)
        device = process.setup_process_group()
        return train(recipe, device, planned=announce(recipe, device) if dist.is_main() else None)

    return command.guarded(run)


if __name__ == "__main__":
    process.leave(main())
