"""What a config will need, before anything is launched: parameters, steps, shards. Builds no weights.

python pretrain/plan.py pretrain/configs/clip_vit_b32.yaml [section.key=value ...]
"""

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain import command, config, recipe

EXAMPLE = "example: python pretrain/plan.py pretrain/configs/clip_vit_b32.yaml train.batch_size=4096"


def parameter_counts(section: recipe.Recipe) -> dict[str, int]:
    """Return the number of parameters of each part of the model, and of all, without allocating any."""
    words = recipe.build_tokenizer(section.model)
    with torch.device("meta"):
        model = recipe.build_model(section.model, words)
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**counts, "parameters": total, "trainable": trainable}


def table(section: recipe.Recipe) -> str:
    """Return the plan as text, one figure a line."""
    lines = [f"{name:>12} {count:>15,}" for name, count in parameter_counts(section).items()]
    lines.append(f"{'batch':>12} {section.train.batch_size:>15,}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Print the plan of a config; 2 where the config cannot be used."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("config", help="a YAML config")
    parser.add_argument("override", nargs="*", help="section.key=value")
    args = parser.parse_args(words)

    def run() -> int:
        print(table(config.load(recipe.Recipe, args.config, args.override)))
        return 0

    return command.guarded(run)


if __name__ == "__main__":
    raise SystemExit(main())
