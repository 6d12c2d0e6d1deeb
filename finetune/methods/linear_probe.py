"""Linear probe: logistic regression on frozen features (Radford et al. 2021, arXiv:2103.00020, appendix A.3).

Minimises  C * sum of cross-entropies + |W|^2 / 2  with L-BFGS in float64, the bias left free, as scikit-learn does.
C is chosen on the validation split: seven values from 1e-6 to 1e6, then eight halvings of the step around the best.
Shapes: N = images, D = feature width, K = classes.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.methods import base
from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.pretrained import Pretrained

EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  #: ascending, so that each solution starts the next
HALVINGS = 8


class Config(base.Config):
    """`method:` of the linear probe."""

    features: Literal["penultimate", "joint"] = "penultimate"  #: before the projection, or unit-norm after it
    c: float | None = Field(default=None, gt=0)  #: inverse strength of the penalty; null: chosen on validation
    max_iterations: int = Field(default=1000, gt=0)


class Problem(NamedTuple):
    """Features and their classes."""

    features_ND: Tensor
    target_N: Tensor


class Solution(NamedTuple):
    """A linear classifier."""

    weight_KD: Tensor
    bias_K: Tensor

    def logits(self, features_ND: Tensor) -> Tensor:
        """Return [N, K]."""
        return F.linear(features_ND, self.weight_KD, self.bias_K)


class Method(base.Method):
    """A linear head that is solved, not trained; the base never changes."""

    serves = ("classify",)
    needs = ("image",)
    trains = ("head.*",)
    fits = True
    config: Config

    def __init__(self, config: Config, pretrained: Pretrained, names: list[str]) -> None:
        super().__init__(config, pretrained, names)
        vision = pretrained.model.vision
        width = vision.width if config.features == "penultimate" else pretrained.model.config.embed_dim
        self.head = nn.Linear(width, len(names))
        self.pictures_by = "features" if config.features == "joint" else "pooled"

    @classmethod
    def splits(cls, config: Config) -> tuple[str, ...]:
        """Return train, and validation where C is chosen."""
        return ("train",) if config.c else ("train", "validation")

    def features(self, batch: Batch) -> Tensor:
        """Return the frozen features [N, D]."""
        seen = self.model(batch)
        return seen.image if self.config.features == "joint" else seen.pooled

    def classify(self, batch: Batch, classes_KE: Tensor | None) -> Tensor:
        """Return logits [N, K]."""
        return self.head(self.features(batch))

    def classify_features(self, image_NE: Tensor, classes_KE: Tensor | None) -> Tensor:
        """Return logits [N, K] of joint features, for a head that was solved on them."""
        assert self.config.features == "joint"
        return self.head(image_NE)

    def fit(self, read: base.Read) -> dict[str, float]:
        """Encode on all ranks, solve on the first, give every rank the head.

        Raises:
            ConfigError: C is to be chosen and there is no validation split.
        """
        train = self._encode(read("train"))
        validation = None if self.config.c else self._encode(read("validation"))
        answer = None
        if dist.is_main():
            answer = self._solve(train, validation)
        solution, logs = dist.broadcast_object(answer)
        with torch.no_grad():
            self.head.weight.copy_(solution.weight_KD)
            self.head.bias.copy_(solution.bias_K)
        return logs

    def _encode(self, batches: Iterator[Batch]) -> Problem:
        """Return all ranks' features in the order of the keys: the same whatever the number of ranks."""
        rows: list[tuple[str, Tensor, int]] = []
        with torch.no_grad():
            for batch in batches:
                own = len(batch) - batch.filler
                rows += zip(batch.keys[:own], self.features(batch).cpu(), base.targets(batch).tolist())
        everyone = sorted((row for part in dist.gather_objects(rows) for row in part), key=lambda row: row[0])
        if not everyone:
            raise ConfigError("linear_probe: no samples to fit; give task a validation split, or a fixed method.c")
        return Problem(torch.stack([row[1] for row in everyone]), torch.tensor([row[2] for row in everyone]))

    def _solve(self, train: Problem, validation: Problem | None) -> tuple[Solution, dict[str, float]]:
        classes, limit = len(self.names), self.config.max_iterations
        if validation is None:
            assert self.config.c
            return solve(train, classes, c=self.config.c, max_iterations=limit), {"c": self.config.c}
        found, exponent, accuracy = search(train, validation, classes, max_iterations=limit)
        return found, {"c": 10**exponent, "validation_accuracy": accuracy}


def solve(
    problem: Problem, classes: int, *, c: float, max_iterations: int = 1000, start: Solution | None = None
) -> Solution:
    """Return the minimum of  c * sum of cross-entropies + |W|^2 / 2  (float64, CPU).

    L-BFGS runs in coordinates in which the problem is round (features centred, turned to their principal axes, each
    scaled by its curvature): the same minimum in a tenth of the steps.
    """
    x_ND, y_N = problem.features_ND.double(), problem.target_N
    penalty = 1.0 / (c * len(y_N))  # of the mean loss: steps and tolerances of one size for every C and N
    mean_D = x_ND.mean(0)
    spread_D, axes_DD = torch.linalg.eigh((x_ND - mean_D).T @ (x_ND - mean_D) / len(y_N))
    scale_D = (spread_D.clamp(min=0) / classes + penalty).rsqrt()
    round_ND = (x_ND - mean_D) @ axes_DD * scale_D
    v_KD = torch.zeros(classes, x_ND.shape[1], dtype=torch.float64)
    bias_K = torch.zeros(classes, dtype=torch.float64)
    if start is not None:
        v_KD = start.weight_KD @ axes_DD / scale_D
        bias_K = start.bias_K + start.weight_KD @ mean_D
    free = [v_KD.requires_grad_(), bias_K.requires_grad_()]
    solver = torch.optim.LBFGS(
        free, max_iter=max_iterations, max_eval=2 * max_iterations, history_size=20,
        tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        weight_KD = v_KD * scale_D  # turned: its length is that of W
        loss = F.cross_entropy(F.linear(round_ND, v_KD, bias_K), y_N) + 0.5 * penalty * weight_KD.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    weight_KD = (v_KD.detach() * scale_D) @ axes_DD.T
    return Solution(weight_KD, bias_K.detach() - weight_KD @ mean_D)


def search(
    train: Problem, validation: Problem, classes: int, *, max_iterations: int = 1000
) -> tuple[Solution, float, float]:
    """Return the solution that is best on validation, log10 of its C, and its accuracy there.

    A small validation split gives many equal accuracies: the lower cross-entropy decides.
    """

    def judged(exponent: float, start: Solution | None) -> tuple[tuple[float, float], float, Solution]:
        found = solve(train, classes, c=10**exponent, max_iterations=max_iterations, start=start)
        logits_NK = found.logits(validation.features_ND.double())
        accuracy = float((logits_NK.argmax(1) == validation.target_N).double().mean())
        return (accuracy, -float(F.cross_entropy(logits_NK, validation.target_N))), exponent, found

    tried = []
    for exponent in EXPONENTS:
        tried.append(judged(exponent, tried[-1][2] if tried else None))
    best = max(tried, key=lambda t: t[0])
    step = 1.0
    for _ in range(HALVINGS):
        sides = [judged(best[1] + sign * step, best[2]) for sign in (-1, 1)]
        best = max([best, *sides], key=lambda t: t[0])
        step /= 2
    return best[2], best[1], best[0][0]
