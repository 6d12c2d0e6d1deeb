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

from safetensors import SafetensorError

from finetune import delta
from finetune.recipe import Recipe
from pretrain import config, pretrained, registry, verification
from pretrain.config import ConfigError
from pretrain.data.format import ShardError
from pretrain.engine.checkpoint import CheckpointError
from pretrain.export import PACKAGE, export
from pretrain.pretrained import Pretrained
from pretrain.verification import ExportError


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
        epilog="example: python -m finetune.export runs/lora_iconcaps exports/lora_iconcaps --format hf",
    )
    parser.add_argument("run", type=Path, help="folder of a fine-tuned run")
    parser.add_argument("out", help="folder to make; an earlier export there is replaced")
    parser.add_argument("--format", required=True, choices=registry.names(PACKAGE))
    parser.add_argument("--pairs", metavar="SHARDS", help="compare on the first 32 pairs of these tars")
    parser.add_argument("override", nargs="*", metavar="key=value", help="base=..., or e.g. method.wise=0.3")
    args = parser.parse_intermixed_args(words)
    try:
        pairs = verification.real(args.pairs) if args.pairs else None
        found = export(merged(args.run, args.override), args.out, format=args.format, pairs=pairs)
    except (ConfigError, ShardError, ValueError) as error:
        config.exit_with(error)
    except (ExportError, CheckpointError, OSError, SafetensorError) as error:
        config.exit_with(RuntimeError(f"export {args.out}: {error}; nothing was kept"), code=1)
    figures = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    print(f"{args.out}: {args.format}, verified ({figures})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
