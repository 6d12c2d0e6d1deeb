"""Tip-Adapter: the training pictures as a cache of keys and classes (Zhang et al. 2021, arXiv:2111.03930, 2207.09519).

    logits = scale f W + alpha sum over cached pictures m of exp(-beta (1 - f key_m)) onehot_m

Nothing trains, or with `train_keys` the keys do (Tip-Adapter-F). alpha and beta are chosen on the validation split, by
a grid; the released code looks at the test split for ImageNet, and picks the best of F's epochs there: scores here are
slightly lower for that.
Shapes: N = images, M = cached pictures, K = classes, E = joint width, A = alphas, B = betas.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.layers.sentences import Sentences
from finetune.methods import base
from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.pretrained import Pretrained


class Config(base.Config):
    """`method:` of Tip-Adapter; the defaults are the paper's, the grid is the released one of ImageNet."""

    train_keys: bool = False  #: Tip-Adapter-F: the keys train, from the cache on
    alpha: float = Field(default=1.0, ge=0)  #: weight of the cache; what F trains with
    beta: float = Field(default=5.5, gt=0)  #: how sharp it is
    search: bool = True  #: choose alpha and beta on validation, at the end; false: keep them
    max_alpha: float = Field(default=3.0, gt=0.1)  #: end of the grid, for alphas from 0.1 on
    max_beta: float = Field(default=7.0, gt=0.1)
    alphas: int = Field(default=20, gt=0)
    betas: int = Field(default=200, gt=0)
    views: int = Field(default=10, ge=0)  #: augmented passes whose features a key is the mean of; 0: one plain pass
    templates: str | list[str] | None = None  #: sentences of the classes; null: those of the task


class Cache(nn.Module):
    """Keys and their classes; it has as many rows as it was filled or loaded with."""

    target_M: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes  # not the largest class that happens to be cached
        self.keys = nn.Parameter(torch.empty(0, width))
        self.register_buffer("target_M", torch.empty(0, dtype=torch.int64))

    def fill(self, keys_ME: Tensor, target_M: Tensor) -> None:
        """Put pictures in."""
        self.keys.data = keys_ME.to(self.keys.device)
        self.target_M = target_M.to(self.keys.device)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}keys" in state:
            self.fill(state[f"{prefix}keys"], state[f"{prefix}target_M"])
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, image_NE: Tensor) -> Tensor:
        """Return cosines with all keys [N, M]; trained keys leave the sphere, as they do in the released code."""
        with base.exact(image_NE):
            return F.linear(image_NE.float(), self.keys.float())

    def votes(self, cosine_NM: Tensor, beta: float) -> Tensor:
        """Return the sum of exp(-beta (1 - cosine)) over the pictures of each class, [N, K]."""
        with base.exact(cosine_NM):
            return (-beta * (1 - cosine_NM)).exp() @ F.one_hot(self.target_M, self.classes).to(cosine_NM.dtype)


class Method(base.Method):
    """Zero-shot logits and votes of the training pictures."""

    serves = ("classify",)
    needs = ("image", "text")
    trains = ("cache.*",)
    fits = True
    pictures_by = "features"
    rates = (base.Rate("adamw", 1e-4, 1e-2),)
    config: Config

    def __init__(self, config: Config, pretrained: Pretrained, names: list[str]) -> None:
        super().__init__(config, pretrained, names)
        self.cache = Cache(pretrained.config.embed_dim, len(names))
        self.sentences = Sentences(pretrained, names, config.templates or base.TEMPLATES, frozen=True)

    @classmethod
    def solved(cls, config: Config) -> bool:
        """Return whether the keys stay as they are."""
        return not config.train_keys

    @classmethod
    def splits(cls, config: Config) -> tuple[str, ...]:
        """Return train, and validation where alpha and beta are chosen."""
        return ("train", "validation") if config.search else ("train",)

    @classmethod
    def epochs(cls, shots: int | None) -> int:
        """Return the paper's 20 for F."""
        return 20

    def fit(self, read: base.Read) -> dict[str, float]:
        """Fill the cache, choose alpha and beta."""
        with torch.no_grad():
            self.prepare(read)
            return self.choose(read)

    def prepare(self, read: base.Read) -> None:
        """Cache the train split, in the order of its keys: the same whatever the number of ranks."""
        sums: dict[str, tuple[Tensor, int]] = {}
        for batch in read("train", views=self.config.views):
            kept = not self.config.views or batch.image_NE is not None  # pictures that are not augmented have one view
            feature_NE = self.model(batch).image if kept else self._view(batch)
            own = len(batch) - batch.filler
            for key, feature_E, target in zip(batch.keys[:own], feature_NE.float().cpu(), base.targets(batch).tolist()):
                sums[key] = (sums[key][0] + feature_E if key in sums else feature_E, target)
        everyone: dict[str, tuple[Tensor, int]] = {}
        for part in dist.gather_objects(sums):
            for key, (feature_E, target) in part.items():
                everyone[key] = (everyone[key][0] + feature_E if key in everyone else feature_E, target)
        if not everyone:
            raise ConfigError("method tip_adapter: the train split has no usable picture to cache")
        rows = [everyone[key] for key in sorted(everyone)]
        self.cache.fill(F.normalize(torch.stack([row[0] for row in rows]), dim=-1), torch.tensor([r[1] for r in rows]))

    def _view(self, batch: Batch) -> Tensor:
        """Return the features [N, E] of augmented pictures, which are averaged before they are normalised."""
        assert batch.image_NCHW is not None, "views of augmented pictures are no table of features"
        features: Tensor = self.model.vision(batch.image_NCHW).image_NE
        return features

    def choose(self, read: base.Read) -> dict[str, float]:
        """Take the alpha and beta that are best on validation."""
        config = self.config
        if not config.search:
            return {"alpha": config.alpha, "beta": config.beta}
        alphas, betas = grid(config.max_alpha, config.alphas), grid(config.max_beta, config.betas)
        classes_KE = self.classes()
        total_2BA = torch.zeros(2, len(betas), len(alphas), dtype=torch.float64, device=self.scale_1.device)
        count = torch.zeros(1, device=self.scale_1.device)
        for batch in read("validation"):
            image_NE, own = self.model(batch).image, len(batch) - batch.filler
            zero_NK, cosine_NM = self.zero_shot(image_NE, classes_KE)[:own], self.cache(image_NE)[:own]
            total_2BA += judge(self.cache, zero_NK, cosine_NM, base.targets(batch)[:own], alphas, betas)
            count += own
        hits_BA, loss_BA = dist.total(total_2BA).cpu()
        b, a = best(hits_BA, loss_BA)
        self.config = config.model_copy(update={"alpha": alphas[a], "beta": betas[b]})
        return {
            "alpha": alphas[a],
            "beta": betas[b],
            "validation_accuracy": float(hits_BA[b, a] / dist.total(count).cpu()),
        }

    def classes(self) -> Tensor:
        """Return unit-norm text features [K, E]."""
        features: Tensor = self.sentences(self.model.text)
        return features

    def zero_shot(self, image_NE: Tensor, classes_KE: Tensor) -> Tensor:
        """Return scaled cosines with the classes [N, K]."""
        return base.scaled_cosines(self.scale_1, image_NE, classes_KE)

    def classify_features(self, image_NE: Tensor, classes_KE: Tensor | None) -> Tensor:
        """Return logits [N, K]."""
        assert classes_KE is not None
        votes_NK = self.cache.votes(self.cache(image_NE), self.config.beta)
        return self.zero_shot(image_NE, classes_KE) + self.config.alpha * votes_NK


def grid(end: float, count: int) -> list[float]:
    """Return `count` values from 0.1 on, evenly spaced, before `end`."""
    return [0.1 + (end - 0.1) * i / count for i in range(count)]


def judge(
    cache: Cache, zero_NK: Tensor, cosine_NM: Tensor, target_N: Tensor, alphas: list[float], betas: list[float]
) -> Tensor:
    """Return right answers and sums of cross-entropies [2, B, A] of every pair on some pictures."""
    alpha_A11 = zero_NK.new_tensor(alphas)[:, None, None]
    rows = []
    for beta in betas:
        logits_ANK = zero_NK + alpha_A11 * cache.votes(cosine_NM, beta)
        right_ANK = logits_ANK.gather(2, target_N[None, :, None].expand(len(alphas), -1, 1))
        hits_A = (logits_ANK.argmax(2) == target_N).sum(1)
        rows.append(torch.stack([hits_A.double(), (logits_ANK.logsumexp(2) - right_ANK[..., 0]).double().sum(1)]))
    return torch.stack(rows, dim=1)


def best(hits_BA: Tensor, loss_BA: Tensor) -> tuple[int, int]:
    """Return the place of most hits; of equal ones, as a small split has many, that of the lowest cross-entropy."""
    loss_BA = loss_BA.masked_fill(hits_BA < hits_BA.max(), torch.inf)
    return divmod(int(loss_BA.argmin()), loss_BA.shape[1])
