"""Zero-shot classification: the class whose name fits best (Radford et al. 2021, arXiv:2103.00020, section 3.1).

Class weights are means over templates of unit-norm text features, normalised again. Classes may belong
to groups (seen, unseen): each group is scored among its own classes, and among all.
Shapes: N = images, K = classes, t = templates, E = embedding width.
"""

import json
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pretrain import dist
from pretrain.config import ConfigError
from pretrain.data import prompts
from pretrain.evals import base
from pretrain.metrics.classification import top_k
from pretrain.metrics.interval import Score, proportion


class Config(base.Config):
    """`evals.zero_shot`."""

    classes: str  #: JSON list of {"name", "group"?}; a sample's json member holds its index
    field: str = "class"  #: the key of that index
    templates: str | list[str] = "plain"  #: a named set of pretrain/data/prompts.py, or templates with {}
    k: list[int] = Field(default_factory=lambda: [1, 5])


class Eval(base.Eval):
    """Top-k accuracy of each group of classes."""

    config: Config
    needs = ("image", "text")

    def run(self, features: base.Features) -> dict[str, Score]:
        """Return GROUP/topK among the group's classes and, where there are several, GROUP_among_all/topK."""
        classes = read_classes(self.config.classes)
        weight_KE = class_weights(
            features, [c["name"] for c in classes], self.config.templates, batch_size=self.config.batch_size
        )
        logits_NK, target_N = self._score(features, weight_KE)
        groups: dict[str, list[int]] = {}
        for index, entry in enumerate(classes):
            groups.setdefault(entry.get("group", ""), []).append(index)
        scores = {}
        for group, members in groups.items():
            prefix = f"{group}/" if group else ""
            scores |= {f"{prefix}top{k}": self._top_k(logits_NK, target_N, members, k=k, among=members)
                       for k in self.config.k}  # fmt: skip
            if len(groups) > 1:
                everyone = list(range(len(classes)))
                scores |= {f"{group}_among_all/top{k}": self._top_k(logits_NK, target_N, members, k=k, among=everyone)
                           for k in self.config.k}  # fmt: skip
        return scores

    def _score(self, features: base.Features, weight_KE: Tensor) -> tuple[Tensor, Tensor]:
        logits, targets = [], []
        for batch in self.batches(features):
            logits.append((features.of(batch, "image") @ weight_KE.T).cpu())
            targets += [self._target(meta, len(weight_KE)) for meta in batch.meta[: len(batch) - batch.filler]]
        return torch.cat(logits), torch.tensor(targets)

    def _target(self, meta: dict[str, object], num_classes: int) -> int:
        index = meta.get(self.config.field)
        if not isinstance(index, int) or not 0 <= index < num_classes:
            raise ConfigError(
                f"evals.zero_shot: a sample of {self.config.data} has {self.config.field}={index!r} in its json; "
                f"expected an index into the {num_classes} classes of {self.config.classes}"
            )
        return index

    @staticmethod
    def _top_k(logits_NK: Tensor, target_N: Tensor, members: list[int], *, k: int, among: list[int]) -> Score:
        position_K = torch.full((logits_NK.shape[1],), -1)
        position_K[torch.tensor(among)] = torch.arange(len(among))
        mine_N = torch.isin(target_N, torch.tensor(members))
        if bool(mine_N.any()):
            local = top_k(logits_NK[mine_N][:, among], position_K[target_N[mine_N]], k)
            hits = torch.tensor([round(local.value * local.count), local.count])
        else:
            hits = torch.zeros(2, dtype=torch.long)
        parts = dist.gather_objects(hits.tolist())
        return proportion(sum(p[0] for p in parts), sum(p[1] for p in parts))


def read_classes(path: str) -> list[dict[str, str]]:
    """Return the classes of a JSON file: a list of names, or of {"name", "group"?}."""
    try:
        classes = json.loads(Path(path).read_text(encoding="utf-8"))
        return [c if isinstance(c, dict) and c["name"] else {"name": str(c)} for c in classes]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"classes {path}: expected a JSON list of {{'name': ...}} ({error})") from error


def class_weights(features: base.Features, names: list[str], templates: str | list[str], *, batch_size: int) -> Tensor:
    """Return one unit-norm weight a class, [K, E]: the mean over templates of unit-norm text features."""
    lines = [line for sentences in prompts.fill(names, templates) for line in sentences]
    text_KtE = features.texts(lines, batch_size=batch_size).unflatten(0, (len(names), -1))
    return F.normalize(text_KtE.mean(1), dim=-1)
