"""Score a run, a checkpoint, an export or a transformers folder, without training.

    python pretrain/evaluate.py MODEL [evals.zero_shot.data=... evals.zero_shot.classes=...]

A run's own config says which evals; `--config FILE` or overrides say it for anything else. Under deepspeed or
torchrun the work is split over ranks; the numbers are the same.
"""

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain import command, config, dist, pretrained, registry
from pretrain import recipe as recipes
from pretrain.config import ConfigError
from pretrain.engine import process
from pretrain.evals.base import Features, refuse_unserved
from pretrain.metrics.interval import Score

EXAMPLE = """examples:
  python pretrain/evaluate.py runs/clip_iconcaps
  python pretrain/evaluate.py exports/hf --config pretrain/configs/clip_iconcaps_vit.yaml"""


def read_evals(model: str, file: str | None, words: list[str]) -> dict[str, Any]:
    """Return the evals' sections from a config file or the run's own, with overrides.

    Raises:
        ConfigError: no eval is named anywhere.
    """
    folder = Path(model)
    own = [p / "config.yaml" for p in (folder, folder.parent.parent) if (p / "config.yaml").is_file()]
    tree = config.read_yaml(file or own[0]) if file or own else {}
    sections = config.override({"evals": tree.get("evals") or {}}, words)
    stray = [key for key in sections if key != "evals"]
    if stray:
        raise ConfigError(f"evaluate takes evals.* overrides only, not {stray[0]}.*")
    if not sections["evals"]:
        known = ", ".join(registry.names("pretrain.evals"))
        raise ConfigError(f"{model} names no evals; add --config FILE or e.g. evals.retrieval.data=SHARDS ({known})")
    return recipes.plug_ins("pretrain.evals", sections["evals"])


def evaluate(model: str, sections: dict[str, Any], *, average: bool = True) -> dict[str, Score]:
    """Return the scores of a model, or of the average that its run kept, by eval and name. All ranks call it."""
    device = process.setup_process_group()
    loaded = pretrained.load(model, device=device, average=average)
    refuse_unserved(sections, loaded.model.provides)
    recipes.show_as_many(loaded.config, {f"evals.{name}.regions": one.regions for name, one in sections.items()})
    recipes.refuse_other_grid(
        loaded.config, {f"evals.{name}.instruction": one.instruction for name, one in sections.items()}
    )
    features = Features(
        run=lambda batch, want: want(loaded.model, batch) if callable(want) else getattr(loaded.model(batch), want),
        transform=loaded.transform,
        composer=loaded.composer,
        device=device,
    )
    found = {}
    for name, section in sections.items():
        scorer = registry.find("pretrain.evals", name).Eval(section)
        found |= {f"{name}/{key}": score for key, score in scorer.run(features).items()}
    return found


def main(words: list[str] | None = None) -> int:
    """Print the scores, one a line, with their 95 % intervals."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, export or transformers CLIP folder")
    parser.add_argument("--config", metavar="FILE", help="take the evals of this config")
    parser.add_argument("--no-ema", action="store_true", help="the last weights of a run, though it kept an average")
    parser.add_argument("--json", metavar="OUT", help="write the scores to this file too")
    parser.add_argument("override", nargs="*", metavar="evals.NAME.key=value", help="changes to the evals")
    args = parser.parse_intermixed_args(words)

    def run() -> int:
        sections = read_evals(args.model, args.config, args.override)
        found = evaluate(args.model, sections, average=not args.no_ema)
        if dist.is_main():
            print("\n".join(f"{name} {score} of {score.count}" for name, score in found.items()))
            if args.json:
                tree = {name: score._asdict() for name, score in found.items()}
                Path(args.json).write_text(json.dumps(tree, indent=1) + "\n")
        return 0

    return command.guarded(run)


if __name__ == "__main__":
    process.leave(main())
