"""Whole pretraining runs as functions that a pool of ranks can call."""

import json
from pathlib import Path

import torch

from pretrain import config, main
from pretrain.recipe import Recipe


def pretrain(file: Path, *words: str) -> int:
    """Run pretraining on this rank as pretrain/main.py would; return its exit code."""
    return main.train(config.load(Recipe, file, words), torch.device("cpu"))


def losses(run: Path) -> dict[int, float]:
    """Return the loss of every step that metrics.jsonl holds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "a step is reported twice"
    return {line["step"]: line["loss"] for line in lines}
