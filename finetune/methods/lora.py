"""LoRA on either tower (Hu et al. 2021, arXiv:2106.09685; with CLIP: Zanella & Ben Ayed 2024, arXiv:2405.18541).

Low-rank updates of the towers' linears, found by role in every kind of tower; classes are sentences around their names,
encoded with the updated text tower. Merged, the model is one like any other.
Shapes: N = images, K = classes, E = joint width.
"""

from typing import Literal, get_args

from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.layers.low_rank import LowRank
from finetune.layers.sentences import Sentences
from finetune.methods import base
from pretrain.config import ConfigError
from pretrain.models import sites
from pretrain.pretrained import Pretrained

FUSED = ("q", "k", "v")  #: the parts of a qkv linear, in order
Role = Literal["q", "k", "v", "out", "up", "down"]
ROLES = get_args(Role)


class Config(base.Config):
    """`method:` of LoRA; the defaults are those of few-shot CLIP (arXiv:2405.18541)."""

    towers: Literal["vision", "text", "both"] = "both"
    roles: list[Role] = Field(default_factory=lambda: ["q", "k", "v"], min_length=1)
    rank: int = Field(default=2, gt=0)
    alpha: float = Field(default=1.0, gt=0)  #: updates are scaled by alpha / rank
    dropout: float = Field(default=0.25, ge=0, lt=1)  #: of what goes into the updates
    templates: str | list[str] | None = None  #: sentences of the classes; null: those of the task

    @field_validator("roles")
    @classmethod
    def _once(cls, value: list[Role]) -> list[Role]:
        if len(set(value)) < len(value):
            raise ValueError(f"{value} names a role twice")
        return value


class Method(base.Method):
    """Low-rank updates inside the towers."""

    serves = ("classify", "retrieve")
    needs = ("image", "text")
    trains = ("model.*.lora_a", "model.*.lora_b")
    open_classes = True
    rates = (base.Rate("adamw", 1e-5, 2e-3),)
    config: Config

    def __init__(self, config: Config, pretrained: Pretrained, names: list[str]) -> None:
        super().__init__(config, pretrained, names)
        self.pictures_by = "features" if config.towers == "text" else "pixels"
        for tower in ("vision", "text") if config.towers == "both" else (config.towers,):
            self._attach(tower)
        fixed = config.towers == "vision"
        self.sentences = Sentences(pretrained, names, config.templates or base.TEMPLATES, frozen=fixed)

    def _attach(self, tower: str) -> None:
        """Update the linears of a tower.

        Raises:
            ConfigError: it lacks one of the roles; convolutional towers have none.
        """
        config = self.config
        chosen = tuple(part for part, role in enumerate(FUSED) if role in config.roles)
        found = sites.sites(self.model, tower=tower)
        found = [site for site in found if isinstance(self.model.get_submodule(site.name), nn.Linear)]
        offered = {site.role for site in found if site.role in ROLES}
        offered |= set(FUSED) if any(site.role == "qkv" for site in found) else set()
        if lacking := [role for role in config.roles if role not in offered]:
            raise ConfigError(
                f"method.roles: the {tower} tower of the base has no linear for {', '.join(lacking)}; "
                f"it has {', '.join(sorted(offered)) or 'none'}"
            )
        wanted = (*config.roles, *(("qkv",) if chosen else ()))
        for site in (site for site in found if site.role in wanted):
            fused = {"parts": 3, "chosen": chosen} if site.role == "qkv" else {}
            keys = {"rank": config.rank, "alpha": config.alpha, "dropout": config.dropout, **fused}
            sites.replace(self.model, site, lambda inner, keys=keys: LowRank(inner, **keys))

    def low_ranks(self) -> dict[str, LowRank]:
        """Return the updates by the name of their linear in the model."""
        return {name: part for name, part in self.model.named_modules() if isinstance(part, LowRank)}

    def train(self, mode: bool = True) -> "Method":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Switch mode; of the base, which is frozen, only the updates leave eval mode."""
        super().train(mode)
        self.model.eval()
        for update in self.low_ranks().values():
            update.train(mode)
        return self

    def classes(self) -> Tensor:
        """Return unit-norm text features [K, E]."""
        features: Tensor = self.sentences(self.model.text)
        return features

    def classify_features(self, image_NE: Tensor, classes_KE: Tensor | None) -> Tensor:
        """Return scaled cosines [N, K]."""
        assert classes_KE is not None
        return base.scaled_cosines(self.scale_1, image_NE, classes_KE)

    def merge(self) -> None:
        """Put every updated linear back, the update in its weight."""
        for name, update in self.low_ranks().items():
            parent, _, child = name.rpartition(".")
            linear: nn.Linear = update.merged()
            setattr(self.model.get_submodule(parent), child, linear)
