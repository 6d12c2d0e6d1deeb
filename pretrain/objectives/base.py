"""What an objective is, and Mixture: the one module that DeepSpeed wraps.

An objective is a small module around features. It says what it `needs` of the model ("image", "text", ...); what the
model does not provide is refused before any weight is built. There are two natures:

- Objective: its loss is a sum over rows (or tokens) divided by what the whole step counts. `prepare` draws and counts.
- Contrast: its loss compares rows of the whole step, of all ranks. It offers `features` and `loss_from_features`;
  `keys`, where rows are compared with what gets no gradient; `begin`, where a step changes what it compares with.

So both can be trained in micro-batches with the gradient of the whole batch (engine/accumulate.py). Logged scalars are
returned apart from the loss, so a meter cannot mistake one for the other.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pretrain import dist, registry
from pretrain.batch import Batch
from pretrain.config import ConfigError, Section
from pretrain.models.depth import Depth
from pretrain.models.vlm import Encodings


class Config(Section):
    """Base of every objective's section."""

    weight: float = 1.0


class Prepared(NamedTuple):
    """What an objective knows of a batch before the step's first forward."""

    draws: dict[str, Tensor]  #: what it drew, e.g. masks: a second forward of the batch must see the same
    #: what counts, e.g. target tokens, as a scalar, or [n] where n sums have counts of their own: of this batch where
    #: an objective returns it; of the whole step, or of its mini-batch `Batch.part`, where it gets it back, divided by
    #: the number of ranks, so that the mean over ranks of sum / count is global
    count: Tensor | None
    #: 1 / batches of the step. Scalars are averaged over these: one that is sum / count is divided by this first
    part: float = 1.0


class Share(NamedTuple):
    """What was prepared for one batch of a step."""

    prepared: dict[str, Prepared]  #: by objective
    part: float  #: 1 / batches of the step


class Objective(nn.Module):
    """Base of every objective."""

    needs: ClassVar[tuple[str, ...]] = ()
    whole: bool = False  #: cannot be trained in micro-batches

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def attach(self, model: Any) -> None:
        """Take from the model what `prepare` must know, e.g. its vocabulary; called once, when both are put together.

        Raises:
            ConfigError: what model and objective are told does not fit together.
        """

    def prepare(self, batch: Batch, step: int) -> Prepared:
        """Return draws (a function of batch.draw_B and the step) and the count for one batch; rows count by default."""
        return Prepared({}, torch.tensor(float(len(batch))))

    def forward(self, encodings: Encodings, prepared: Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over what counts in this batch, divided by `prepared.count`, and scalars to log."""
        raise NotImplementedError


class Contrast(Objective):
    """Base of objectives that compare the rows of a step, of all ranks."""

    def prepare(self, batch: Batch, step: int) -> Prepared:
        """Return nothing: every rank holds equally many rows."""
        return Prepared({}, None)

    def begin(self, model: Any, step: int) -> None:
        """Prepare for a step; called once, before its first forward, with the weights that it starts from.

        All ranks call it, outside forward: at ZeRO stage 3 weights are in shards.
        """

    def features(self, encodings: Encodings) -> dict[str, Tensor]:
        """Return features [rows, ...] by name, and what else of the rows is compared (integers).

        A name that two objectives use must mean the same tensor.
        """
        raise NotImplementedError

    def keys(self, encodings: Encodings) -> dict[str, Tensor]:
        """Return what else the loss needs of each row, without gradient, by names that are no feature's.

        A step in micro-batches asks once for them, for features twice.
        """
        return {}

    def loss_from_features(self, model: Any, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's loss (its mean over ranks is the global loss) and scalars to log; called once a step.

        Args:
            model: for the parameters that are its own (temperature, bias); its towers must not be called.
            features: of all rows of this rank, and keys.
        """
        raise NotImplementedError


class Mixture(nn.Module):
    """Model and objectives behind one forward: ZeRO-3 gathers parameters by its hooks, so nothing calls around it."""

    def __init__(self, model: Any, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict(objectives)
        self._contrasts = {name: o for name, o in objectives.items() if isinstance(o, Contrast)}
        self._sums = {name: o for name, o in objectives.items() if name not in self._contrasts}
        for objective in objectives.values():
            objective.attach(model)

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter of the model's towers lies, by name."""
        return {f"model.{name}": found for name, found in self.model.depths().items()}

    def whole(self) -> list[str]:
        """Return the objectives that cannot be trained in micro-batches."""
        return [f"objectives.{name}" for name, objective in self.objectives.items() if objective.whole]

    def contrasts(self) -> bool:
        """Return whether some objective compares rows."""
        return bool(self._contrasts)

    def head(self) -> list[nn.Parameter]:
        """Return the trained parameters that `contrast` may read: the model's own, not its towers', and objectives'."""
        parts = [self.model, *(part for objective in self._contrasts.values() for part in objective.modules())]
        # asked for by name: inside a forward of ZeRO stage 3, that gathers what a module has let go of
        of = [getattr(part, name) for part in parts for name, _ in part.named_parameters(recurse=False)]
        return [p for p in of if p.requires_grad]

    def prepare(self, batches: list[Batch], step: int) -> list[Share]:
        """Return what was drawn for each batch of a step and what its mini-batch counts; one all-reduce at most.

        Called once a step, before its first forward: contrasts begin theirs.
        """
        for contrast in self._contrasts.values():
            contrast.begin(self.model, step)
        drawn = [{name: o.prepare(batch, step) for name, o in self._sums.items()} for batch in batches]
        part = 1 / len(batches)
        if self._sums:
            sizes = [found.count.numel() for found in drawn[0].values()]
            device = next(iter(batches[0].tensors().values())).device
            local = torch.zeros(1 + max(batch.part for batch in batches), sum(sizes), dtype=torch.double, device=device)
            for batch, one in zip(batches, drawn):
                local[batch.part] += torch.cat([found.count.reshape(-1) for found in one.values()]).to(local)
            totals = dist.mean(local)
            for batch, one in zip(batches, drawn):
                for (name, found), count in zip(list(one.items()), totals[batch.part].split(sizes)):
                    one[name] = found._replace(count=count.view_as(found.count), part=part)
        return [Share(one, part) for one in drawn]

    def contrast(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return weighted loss and scalars of the objectives that compare rows."""
        loss = torch.zeros((), device=next(iter(features.values())).device)
        logs = {}
        for name, objective in self._contrasts.items():
            part, scalars = objective.loss_from_features(self.model, features)
            loss = loss + objective.config.weight * part
            logs |= {name: part.detach(), **{f"{name}/{key}": value.detach() for key, value in scalars.items()}}
        return loss, logs

    def forward(
        self,
        batches: list[Batch],
        *,
        prepared: list[Share] | None = None,
        want: str | Callable[[Any, Batch], Any] | None = None,
        pull: tuple[dict[str, Tensor], list[Tensor | None]] | None = None,
    ) -> Any:
        """Return (loss, logs) of a step's batches, all rows compared with each other; or what `want` or `pull` ask for.

        Args:
            batches: what this rank has of the step, or one micro-batch of it.
            prepared: what `prepare` returned for these batches; None: they are a step of their own.
            want: "image" or "text": unit-norm features [rows, E] of the first batch, for evals; "features": what
                `contrast` takes; a function: what it returns of the model and the first batch, e.g. written text
                (ZeRO-3's hooks gather each module that it calls; all ranks must call the same).
            pull: gradients of `contrast` for these features and for `head`. The loss is then that of the other
                objectives, plus a term of value zero that has these gradients.
        """
        if callable(want):
            return want(self.model, batches[0])
        if want in ("image", "text"):
            return getattr(self.model(batches[0]), want)
        assert self.objectives, "a step needs an objective"
        encodings = [self.model(batch) for batch in batches]
        if want == "features":
            return self._compared(encodings)
        shares = self.prepare(batches, 0) if prepared is None else prepared
        if pull is not None:
            loss, logs = _tied(self._features(encodings), pull[0], 1.0), {}
            loss = loss + _tied(dict(enumerate(self.head())), dict(enumerate(pull[1])), shares[0].part)
        else:
            loss, logs = self.contrast(self._compared(encodings)) if self._contrasts else (torch.zeros(()), {})
        for one, share in zip(encodings, shares, strict=True):
            for name, objective in self._sums.items():
                part, scalars = objective(one, share.prepared[name])
                loss = loss.to(part) + objective.config.weight * part
                logs[name] = logs.get(name, 0) + part.detach()
                for key, value in scalars.items():
                    logs[f"{name}/{key}"] = logs.get(f"{name}/{key}", 0) + share.part * value.detach()
        return loss, logs

    def _features(self, encodings: list[Encodings]) -> dict[str, Tensor]:
        return self._rows(encodings, lambda objective, one: objective.features(one))

    def _compared(self, encodings: list[Encodings]) -> dict[str, Tensor]:
        return self._features(encodings) | self._rows(encodings, lambda objective, one: objective.keys(one))

    def _rows(
        self, encodings: list[Encodings], ask: Callable[[Contrast, Encodings], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for one in encodings:
            mine: dict[str, Tensor] = {}
            for objective in self._contrasts.values():
                mine |= ask(objective, one)
            for name, value in mine.items():
                found.setdefault(name, []).append(value)
        return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in found.items()}


def _tied(values: Mapping[Any, Tensor], grads: Mapping[Any, Tensor | None], part: float) -> Tensor:
    """Return zero, with `part` of the given gradients for the values that have one."""
    terms = [(values[name] * grad).sum() for name, grad in grads.items() if grad is not None]
    total = part * torch.stack(terms).sum() if terms else torch.zeros(())
    return total - total.detach()


def build(sections: Mapping[str, Config], model: Any) -> Mixture:
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


def over(total: Tensor, count: Tensor | None) -> Tensor:
    """Return a sum divided by what the step counts; zero, with its graph, in a step where nothing counts."""
    assert count is not None
    return total / torch.where(count > 0, count, 1).to(total.dtype)


def vocabulary_of(model: Any) -> tuple[int, int, tuple[int, ...]]:
    """Return the size of a model's vocabulary, its mask token and all ids that are no words."""
    words = model.words
    assert words.mask is not None, "a model that provides cloze has a mask token"
    specials = {words.start, words.end, words.pad, words.mask} - {None}
    return words.size, words.mask, tuple(sorted(specials))


def refuse_masked(model: Any, name: str) -> None:
    """Raise a ConfigError where a model is to write at mask tokens, and an objective trains it to say the next word."""
    if model.config.fusion.predict != "next":
        raise ConfigError(f"objectives.{name} trains the next word; set model.fusion.predict=next")


def scalar(value: Tensor) -> Tensor:
    """Return a tensor of one element as a 0-dim scalar."""
    return torch.as_tensor(value).reshape(())
