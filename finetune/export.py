"""Merge a fine-tuned run into its base and export that: `python -m finetune.export RUN OUT --format NAME`.

The formats are those of pretrain/export.py, and the export is verified as any. Methods whose parameters have no place
in a model of two towers (prompts, adapters, heads, caches) are refused.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


from finetune import delta
from finetune.recipe import Recipe
from pretrain import config, pretrained, registry
from pretrain.config import ConfigError
from pretrain.export import PACKAGE, report
from pretrain.pretrained import Pretrained


def merged(run: Path, words: list[str]) -> Pretrained:
    """Return the base of a run with what it trained merged in; `words` are overrides of `base` and `method`.

    Raises:
        ConfigError: no run that has come to its end, another base, or a method that cannot be merged.
    """
    if not (run / "config.yaml").is_file() or not (run / delta.FILE).is_file():
        raise ConfigError(f"{run}: no config.yaml and {delta.FILE}; give a fine-tuned run that has come to its end")
    section = config.load(Recipe, run / "config.yaml", words)
    base = pretrained.load(section.base)
    method = delta.read(run / delta.FILE, base, changes=[word for word in words if word.startswith("method.")])
    method.merge()
    model = method.model.eval()
    return replace(base, model=model, weights_hash=pretrained.hash_of(model.state_dict()), source=str(run))


def main(words: list[str] | None = None) -> int:
    """Export by command line: 0 when the folder is there and verified, 1 when it was not kept, 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.export",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python -m finetune.export runs/lora exports/lora --format hf",
    )
    parser.add_argument("run", type=Path, help="folder of a fine-tuned run")
    parser.add_argument("out", help="folder to make; an earlier export there is replaced")
    parser.add_argument("--format", required=True, choices=registry.names(PACKAGE))
    parser.add_argument("--pairs", metavar="SHARDS", help="compare on the first 32 pairs of these tars")
    parser.add_argument("override", nargs="*", metavar="key=value", help="base=..., or e.g. method.wise=0.3")
    args = parser.parse_intermixed_args(words)
    return report(lambda: merged(args.run, args.override), args)


if __name__ == "__main__":
    raise SystemExit(main())
