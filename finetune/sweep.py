"""Every method x shots x seed, each cell a fine-tuning run, one table: `python -m finetune.sweep --config FILE ...`.

A cell is what `finetune/main.py` makes of the same config, in a run folder of its own, OUT/METHOD-shotsK-seedS; this
process reads the base once for all of them, and features come from the cache. Cells that are finished are skipped, an
interrupted one goes on. A method is a name of `methods:` in FILE (sections that are its own, over those of FILE; with
`shots: [...]` it runs at these numbers of --shots only), a module of finetune/methods, or a config of its own.
Results: see finetune/results.py.
"""

import copy
import dataclasses
import functools
import gc
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from finetune import delta, results, sources, splits
from finetune.main import Load, print_once
from finetune.main import run as fine_tune
from finetune.recipe import Recipe
from pretrain import command, config, dist, pretrained, registry
from pretrain.config import ConfigError
from pretrain.engine import process
from pretrain.engine.recovery import TrainingError
from pretrain.pretrained import Pretrained
from pretrain.report import scores

OVERRIDE = re.compile(r"[\w.]+=")
SHARDS = "data"  #: folder of OUT with one's own pictures as shards
EXAMPLE = """examples:
  python -m finetune.sweep --config finetune/configs/sweeps/iconcaps.yaml --out sweeps/icons      (all that FILE lists)
  python -m finetune.sweep --config finetune/configs/sweeps/iconcaps.yaml base=exports/clip_iconcaps/diptych \\
      --methods coop linear_probe tip tip_f --shots 1 2 4 8 16 --seeds 1 2 3 --out sweeps/icons
one's own pictures, FOLDER/CLASS/*.jpg: add task.data=FOLDER
task 3 of a SLURM array of 8: add --cell 3 --of 8"""


class Cell(NamedTuple):
    """One run of a sweep."""

    method: str
    shots: int
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """What its run is called."""
        return f"{self.method}-shots{self.shots}-seed{self.seed}"

    def finished(self) -> bool:
        """Return whether its run has come to its end.

        Raises:
            ConfigError: the folder holds a run of another config.
        """
        folder = self.recipe.run.folder
        there = folder / "config.yaml"
        if there.is_file() and (before := there.read_text(encoding="utf-8")) != config.dump(self.recipe):
            changed = _first_change(before, config.dump(self.recipe))
            raise ConfigError(f"{folder}: holds a run of another config ({changed}); choose another --out")
        return (folder / delta.FILE).is_file() and bool(scores.newest(folder))


def _first_change(before: str, after: str) -> str:
    pairs = zip(before.splitlines(), after.splitlines())
    return next((f"{a.strip()!r} there, {b.strip()!r} here" for a, b in pairs if a != b), "it has other keys")


def tree_of(method: str, file: str | None) -> tuple[str, dict[str, Any]]:
    """Return a method's name in the table and its config, before overrides.

    Raises:
        ConfigError: no such method, or a name without --config.
    """
    if method.endswith((".yaml", ".yml")):
        tree = config.read_yaml(method)
        tree.pop("methods", None)
        return Path(method).stem, tree
    if file is None:
        raise ConfigError(f"--methods {method}: a name needs --config FILE; or give the method's own config, a .yaml")
    tree = config.read_yaml(file)
    own = (tree.pop("methods", None) or {}).get(method)
    if own is None:
        known = registry.names("finetune.methods")
        if method not in known:
            hint = registry.nearest(method, known)
            raise ConfigError(f"--methods {method}: no entry of `methods:` in {file}, no module of methods.{hint}")
        own = {"method": {"name": method}} if (tree.get("method") or {}).get("name") != method else {}
    return method, _over(tree, own)


def _over(tree: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a config with a method's own sections: `method` and the length of `train` take the place of others."""
    out = {**tree, **{key: value for key, value in own.items() if key == "method" or not isinstance(value, dict)}}
    for key, value in own.items():
        if key != "method" and isinstance(value, dict):
            kept = dict(tree.get(key) or {})
            if key == "train" and {"steps", "samples", "epochs"} & value.keys():
                kept = {name: v for name, v in kept.items() if name not in ("steps", "samples", "epochs")}
            out[key] = {**kept, **value}
    return out


def cells(
    methods: Sequence[str], shots: Sequence[int], seeds: Sequence[int], *, file: str | None, out: Path, words: list[str]
) -> list[Cell]:
    """Return all runs of a sweep, in order of method, shots and seed; mistakes are found in all of them first.

    Raises:
        ConfigError: a config that cannot be used, or a task without shots.
    """
    found = []
    for given in methods:
        method, tree = tree_of(given, file)
        for shot in _own_shots(method, tree.pop("shots", None), shots):
            for seed in seeds:
                own = {
                    "run": {"name": f"{method}-shots{shot}-seed{seed}", "dir": str(out), "seed": seed},
                    "task": {"shots": shot, "seed": seed},
                }
                laid = {key: {**(tree.get(key) or {}), **section} for key, section in own.items()}
                whole = config.override({**tree, **laid}, words)
                _refuse_changed(own, whole)
                section = config.build(Recipe, whole, where=f"sweep, {method}")
                if not {"shots", "seed"} <= type(section.task).model_fields.keys():
                    raise ConfigError(f"task.name: {section.task.name} has no shots to sweep over; take few_shot")
                found.append(Cell(method, shot, seed, section))
    names = [cell.name for cell in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"--methods: two cells are called {next(n for n in names if names.count(n) > 1)}")
    return found


def _refuse_changed(own: dict[str, dict[str, Any]], whole: dict[str, Any]) -> None:
    """Raise a ConfigError where an override takes from a cell what sets it apart from the others."""
    for name, section in own.items():
        for key, value in section.items():
            if (whole.get(name) or {}).get(key) != value:
                raise ConfigError(f"{name}.{key}: the sweep gives each cell its own; use --shots, --seeds or --out")


def _own_shots(method: str, own: Any, shots: Sequence[int]) -> list[int]:
    if own is None:
        return list(shots)
    if not isinstance(own, list) or not own or not all(type(shot) is int for shot in own):
        raise ConfigError(f"methods.{method}.shots: {own!r} is no list of numbers of shots, such as [4, 16]")
    return [shot for shot in shots if shot in own]


def listed(file: str | None) -> list[str]:
    """Return the methods that a sweep's config lists.

    Raises:
        ConfigError: it lists none.
    """
    names = list((config.read_yaml(file).get("methods") or {}) if file else {})
    if not names:
        raise ConfigError("--methods: say which, or list them in `methods:` of --config FILE")
    return names


def as_shards(todo: list[Cell], out: Path) -> list[Cell]:
    """Return cells that read shards: pictures in folders, tables or json are written once for all. All ranks call it.

    Draws are those of the pictures themselves, as shards remember their names.
    """
    words = {(cell.recipe.task.data, cell.recipe.task.images) for cell in todo}  # type: ignore[attr-defined]
    if len(words) != 1 or sources.are_shards(next(iter(words))[0]):
        return todo
    [(data, images)] = words

    def make() -> splits.Splits:
        found = sources.find(data, images)
        paths = {s: splits.write(sorted(g, key=lambda x: x.key), out / SHARDS, s) for s, g in found.items()}
        return splits.Splits(**paths, names=[], samples={s: len(g) for s, g in found.items()})

    splits.prepared(out / SHARDS, {"data": data, "images": images}, make)
    for cell in todo:
        cell.recipe.task = cell.recipe.task.model_copy(update={"data": str(out / SHARDS), "images": None})
    return todo


def load_once() -> Load:
    """Return a loader of bases that reads each folder once; every call gets a model of its own."""
    read: Callable[[str], Pretrained] = functools.lru_cache(maxsize=1)(pretrained.load)

    def load(path: str) -> Pretrained:
        first = read(path)
        return dataclasses.replace(first, model=copy.deepcopy(first.model), config=first.config.model_copy(deep=True))

    return load


def unfinished(mine: list[Cell]) -> list[Cell]:
    """Return the cells that are left to run. All ranks call it.

    Raises:
        ConfigError: on every rank, where a folder holds a run of another config.
    """
    problem, done = None, None
    if dist.is_main():
        try:
            done = [cell.finished() for cell in mine]
        except ConfigError as error:
            problem = str(error)
    problem, done = dist.broadcast_object((problem, done))
    if problem:
        raise ConfigError(problem)
    return [cell for cell, finished in zip(mine, done) if not finished]


def run(mine: list[Cell], device: torch.device) -> int:
    """Run the cells that are not finished, one after the other; return the exit code. All ranks call it.

    A cell that fails is told and passed over.
    """
    load, failed, left = load_once(), 0, unfinished(mine)
    if len(left) < len(mine):
        print_once(f"{len(mine) - len(left)} of {len(mine)} cells are finished")
    began = time.monotonic()
    for number, cell in enumerate(left):
        eta = (time.monotonic() - began) / max(1, number) * (len(left) - number)
        rest = f", about {_span(eta)} left" if number else ""
        print_once(f"cell {number + 1} of {len(left)}, {cell.name}{rest}")
        try:
            code = fine_tune(cell.recipe, device, load)
        except (*command.UNUSABLE, TrainingError) as error:
            failed += 1
            print(f"error: {cell.name}: {error}", file=sys.stderr, flush=True)
            code = 0
        if code:
            return code  # told to stop: the cell goes on at the next start
        gc.unfreeze()  # the trainer keeps collections off what it has; now it is another run's turn
        gc.collect()
    return 1 if failed else 0


def written(out: Path) -> str:
    """Write the results of a sweep and return them; say so where no run is finished yet."""
    try:
        return results.write(out)
    except ValueError as error:
        return f"no table: {error}"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(words: list[str] | None = None) -> int:
    """Read the command line and sweep; return the exit code."""
    words = sys.argv[1:] if words is None else words
    given = [word for word in words if OVERRIDE.match(word)]
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("--config", metavar="FILE", help="the config of all methods that are given by name")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="names, or configs of their own; default: all that FILE lists"
    )
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="samples a class")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of draws and training")
    parser.add_argument("--out", type=Path, default=Path("sweeps/few_shot"), help="default: sweeps/few_shot")
    parser.add_argument("--cell", type=int, metavar="I", help="with --of N: only cells I, I + N, I + 2N, ...")
    parser.add_argument("--of", type=int, metavar="N", help="parts, as a SLURM array has tasks")
    parser.add_argument("--list", action="store_true", help="print the names of the cells and stop")
    args = parser.parse_args([word for word in words if word not in given])
    if (args.cell is None) != (args.of is None) or (args.of is not None and not 0 <= args.cell < args.of):
        parser.error("--cell I --of N: both or neither, I from 0 to N - 1")

    def sweep() -> int:
        methods = args.methods or listed(args.config)
        found = cells(methods, args.shots, args.seeds, file=args.config, out=args.out, words=given)
        mine = found if args.of is None else found[args.cell :: args.of]
        if args.list:
            print("\n".join(cell.name for cell in mine))
            return 0
        device = process.setup_process_group()
        code = run(as_shards(mine, args.out), device)
        if dist.is_main() and code in (0, 1):
            print(written(args.out))
        dist.barrier()
        return code

    return command.guarded(sweep)


if __name__ == "__main__":
    process.leave(main())
