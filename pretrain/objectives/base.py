"""What an objective is, and Mixture: the one module that DeepSpeed wraps.

An objective is a small module around features: `forward(encodings) -> (loss, logs)`. It says what it
`needs` of the model ("image", "text", ...); what the model does not provide is refused before any
weight is built. Logged scalars are returned apart from the loss, so a meter cannot mistake one for the other.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pretrain import registry
from pretrain.batch import Batch
from pretrain.config import ConfigError, Section
from pretrain.models.depth import Depth
from pretrain.models.vlm import VLM, Encodings


class Config(Section):
    """Base of every objective's section."""

    weight: float = 1.0


class Objective(nn.Module):
    """Base of every objective."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, encodings: Encodings) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's loss (its mean over ranks is the global loss) and scalars to log."""
        raise NotImplementedError


class Mixture(nn.Module):
    """Model and objectives behind one forward: ZeRO-3 gathers parameters by its hooks, so nothing calls around it."""

    def __init__(self, model: VLM, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict(objectives)

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter of the model's towers lies, by name."""
        return {f"model.{name}": found for name, found in self.model.depths().items()}

    def forward(self, batches: list[Batch], *, want: str | None = None) -> Any:
        """Return (loss, logs) of a step's batches, or, with `want`, that feature of the first batch.

        Args:
            batches: the micro-batches of the step on this rank.
            want: "image" or "text": unit-norm features [rows, E] for evals, instead of a loss.
        """
        if want:
            return getattr(self.model(batches[0]), want)
        loss: Tensor | None = None
        logs: dict[str, Tensor] = {}
        for batch in batches:
            encodings = self.model(batch)
            for name, objective in self.objectives.items():
                part, scalars = objective(encodings)
                loss = objective.config.weight * part + (0 if loss is None else loss)
                logs[name] = logs.get(name, 0) + part.detach() / len(batches)
                logs |= {f"{name}/{key}": value.detach() for key, value in scalars.items()}
        assert loss is not None, "a step needs at least one batch and one objective"
        return loss / len(batches), logs


def build(sections: Mapping[str, Config], model: VLM) -> Mixture:
    """Return the mixture that the config names."""
    plugs = {name: registry.find("pretrain.objectives", name) for name in sections}
    return Mixture(model, {name: plug.Objective(sections[name]) for name, plug in plugs.items()})


def refuse_unserved(sections: Mapping[str, Config], provides: tuple[str, ...]) -> None:
    """Raise a ConfigError where an objective needs what the model does not provide."""
    if not sections:
        known = ", ".join(registry.names("pretrain.objectives"))
        raise ConfigError(f"objectives: name at least one of {known}, e.g. objectives.contrastive.weight=1.0")
    for name in sections:
        missing = set(registry.find("pretrain.objectives", name).Objective.needs) - set(provides)
        if missing:
            raise ConfigError(f"objectives.{name} needs {sorted(missing)}, the model provides {sorted(provides)}")


def scalar(value: Tensor) -> Tensor:
    """Return a tensor of one element as a 0-dim scalar."""
    return torch.as_tensor(value).reshape(())
