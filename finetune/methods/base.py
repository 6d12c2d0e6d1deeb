"""What a fine-tuning method is, and Finetune: the one module that DeepSpeed wraps.

A method says three things: which kinds of task it `serves`, which parameters it `trains` (all else is frozen and never
saved), and how it answers (`classify`). What it cannot do is refused from its class attributes, before weights exist.
Shapes: B = rows, N = images, K = classes, E = joint embedding width.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain import registry
from pretrain.batch import Batch
from pretrain.config import ConfigError, Section
from pretrain.engine.optim import Config as Optim
from pretrain.models import base as models
from pretrain.models import vlm
from pretrain.models.depth import Depth
from pretrain.pretrained import Pretrained
from pretrain.recipe import model_class

TEMPLATES = ["a photo of a {}."]  #: where neither method nor task says any


class Read(Protocol):
    """How a method reads a split: this rank's batches on its device; ranks get equally many."""

    def __call__(self, split: str, *, views: int = 0) -> Iterator[Batch]:
        """Return a plain pass over the split, or `views` passes with the training's augmentation."""


class Config(Section):
    """Base of every method's section."""

    name: str  #: a module of finetune/methods


class Rate(NamedTuple):
    """Learning rates, from low to high, at which an optimizer is known to train a method."""

    optimizer: str
    low: float
    high: float


class Method(nn.Module):
    """Base of every method: holds the base model as `self.model`, its own parameters beside it."""

    serves: ClassVar[tuple[str, ...]] = ()  #: kinds of task: classify, retrieve
    needs: ClassVar[tuple[str, ...]] = ("image",)  #: of the base: image, text, text_embeds
    #: patterns over the names of parameters, and of buffers that go with them, e.g. "head.*" or "model.vision.*"
    trains: tuple[str, ...] = ()
    fits: ClassVar[bool] = False  #: solved at once by `fit`, not trained step by step
    open_classes: bool = False  #: answers about classes that it was not trained on
    rates: ClassVar[tuple[Rate, ...]] = ()  #: of published recipes; others are warned about
    #: of a picture it reads the frozen model's unit-norm feature alone, or what that is projected from (pooled): both
    #: can be computed once and kept
    pictures_by: Literal["features", "pooled", "pixels"] = "pixels"
    scale_1: Tensor  #: the frozen model's temperature, where pictures are read by features

    def __init__(self, config: Any, pretrained: Pretrained, names: list[str]) -> None:
        super().__init__()
        self.config = config
        self.model = pretrained.model
        self.tokenizer = pretrained.tokenizer
        self.names = names
        self.register_buffer("scale_1", self.model.scale.detach().clone(), persistent=False)

    def train(self, mode: bool = True) -> "Method":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Switch mode; a tower of which nothing trains stays in eval mode, without dropout or moving statistics."""
        super().train(mode)
        for part in (self.model, self.model.vision, self.model.text):
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    @classmethod
    def epochs(cls, shots: int | None) -> int | None:
        """Return the published length of a run on `shots` samples a class, for configs that name none."""
        return None

    @classmethod
    def solved(cls, config: Any) -> bool:
        """Return whether `fit` solves for the parameters of this config, so that nothing trains step by step."""
        return cls.fits

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        """Return the splits that this config reads; one that the data lacks is refused."""
        return ("train",)

    def prepare(self, read: Read) -> None:
        """Start from the train split, before training, where a method does. All ranks call it, without gradients."""

    def settle(self) -> None:
        """Make what answers of what was trained, once, on whole weights. All ranks call it, without gradients."""

    def choose(self, read: Read) -> dict[str, float]:
        """Choose what is left by the validation split, after training; return scalars to log. All ranks call it.

        What is chosen is written into `config`, with which a delta is saved.
        """
        return {}

    def merge(self) -> None:
        """Write what was trained into the base, which then answers alone and can be exported as any model.

        Raises:
            ConfigError: it is no part of a model with two towers.
        """
        raise ConfigError(
            f"method {self.config.name}: what it trains has no place in a model of two towers; use the run itself, "
            "with python -m finetune.evaluate"
        )

    def classes(self) -> Tensor | None:
        """Return what does not depend on the pictures, [K, E]: computed once a step, and once an evaluation."""
        return None

    def classify(self, batch: Batch, classes_KE: Tensor | None) -> Tensor:
        """Return logits [N, K] of a batch of pictures; `classes_KE` is what `classes` returned."""
        return self.classify_features(self.model(batch).image, classes_KE)

    def classify_features(self, image_NE: Tensor, classes_KE: Tensor | None) -> Tensor:
        """Return logits [N, K] of pictures' unit-norm features, where `pictures_by` says that these are enough.

        It calls no tower that sees pictures: the features may come from a table.
        """
        raise NotImplementedError

    def fit(self, read: Read) -> dict[str, float]:
        """Solve for the parameters (only where `fits`); return scalars to log. All ranks call it together."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that `trains` names."""
        return {n: p for n, p in self.named_parameters() if self._trains(n)}

    def state(self) -> dict[str, Tensor]:
        """Return what a delta holds: the trained parameters, and the buffers that go with them."""
        return {n: x for n, x in self.state_dict(keep_vars=True).items() if self._trains(n)}

    def _trains(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.trains)


def exact(like: Tensor) -> torch.autocast:
    """Return a context in which products stay float32 where `train.precision` lowers the towers' arithmetic.

    Logits are cosines times 100: at 64 and above, bf16 has steps of 0.5.
    """
    return torch.autocast(like.device.type, enabled=False)


def scaled_cosines(scale_1: Tensor, image_NE: Tensor, classes_KE: Tensor) -> Tensor:
    """Return logits [N, K] of unit-norm features, in float32 whatever the precision of the towers."""
    with exact(image_NE):
        return scale_1 * image_NE @ classes_KE.T


def refuse_task(name: str, *, task: str, kind: str) -> None:
    """Raise a ConfigError where a method cannot serve a kind of task."""
    served = {n: registry.find("finetune.methods", n).Method.serves for n in registry.names("finetune.methods")}
    if kind not in served[name]:
        others = [other for other, kinds in served.items() if kind in kinds]
        hint = f"; methods that do: {', '.join(others)}" if others else ""
        raise ConfigError(f"method.name: {name} serves {served[name]}, not {kind!r} ({task}){hint}")


def refuse_base(name: str, base: models.Config) -> None:
    """Raise a ConfigError where a base model lacks what a method needs."""
    method = registry.find("finetune.methods", name).Method
    native = isinstance(base, vlm.Config) and base.text.name == "native"
    provides = (*model_class(base).provides, *(("text_embeds",) if native else ()))
    missing = [need for need in method.needs if need not in provides]
    if missing == ["text_embeds"] and isinstance(base, vlm.Config):
        raise ConfigError(
            f"method.name: {name} writes word embeddings into the text tower, which {base.text.name!r} does not take; "
            "use a base with the native text tower, or a method such as linear_probe"
        )
    if missing:
        raise ConfigError(
            f"method.name: {name} needs {missing}, the base is a {base.name} and provides {list(provides)}; "
            "take a base of two towers"
        )


def warnings(method: type[Method], optim: Optim) -> list[str]:
    """Return a sentence where an optimizer or its rate is far from all that is published for a method."""
    if not method.rates or any(r.optimizer == optim.optimizer and r.low <= optim.lr <= r.high for r in method.rates):
        return []
    known = " or ".join(f"{rate.optimizer} at {rate.low:g} to {rate.high:g}" for rate in method.rates)
    return [f"optim.lr: {optim.optimizer} at {optim.lr:g}; what is published for this method trains with {known}"]


class Finetune(nn.Module):
    """A method behind one forward, all frozen that it does not train.

    It trains in micro-batches too (engine/accumulate.py): its loss is a sum over rows. Features of classes that train
    are then computed with each micro-batch anew; those of frozen texts are kept.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        trained = method.trained()
        assert trained, f"{method.trains} names no parameter of {type(method).__module__}"
        for name, p in method.named_parameters():
            p.requires_grad_(name in trained)
        self.method = method
        self._classes_KE: Tensor | None = None
        self.train(self.training)

    def train(self, mode: bool = True) -> "Finetune":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Switch mode and forget class features, which belong to the weights of one evaluation."""
        self._classes_KE = None
        super().train(mode)
        return self

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter of the base's towers lies, for optim.layer_decay."""
        return {f"method.model.{name}": depth for name, depth in self.method.model.depths().items()}

    def whole(self) -> list[str]:
        """Return nothing: whatever trains here can be trained in micro-batches."""
        return []

    def contrasts(self) -> bool:
        """Return that no rows are compared."""
        return False

    def head(self) -> list[nn.Parameter]:
        """Return nothing, as no rows are compared."""
        return []

    def contrast(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Never called, as no rows are compared."""
        raise NotImplementedError

    def prepare(self, batches: list[Batch], step: int) -> list[int]:
        """Return for each batch how many rows the step has on this rank, and so on every rank."""
        return [sum(len(batch) for batch in batches)] * len(batches)

    def forward(
        self, batches: list[Batch], *, prepared: list[int] | None = None, want: str | None = None, pull: Any = None
    ) -> Any:
        """Return (loss, logs) of a step's batches, or, with want="logits", their logits [N, K].

        The loss is the mean cross-entropy over this rank's rows of the step; ranks hold equally many, so that the mean
        over ranks is the mean over the global batch. Of micro-batches loss and scalars add up to those of the step.

        Args:
            batches: what this rank has of the step, or one micro-batch of it.
            prepared: what `prepare` returned for these batches; None: they are a step of their own.
            want: "logits", for evals.
            pull: of micro-batches; here nothing is pulled at.
        """
        classes_KE = self._classes()
        logits_NK = torch.cat([self.method.classify(batch, classes_KE) for batch in batches]).float()
        if want == "logits":
            return logits_NK
        target_N = torch.cat([targets(batch) for batch in batches])
        right_N = logits_NK.detach().argmax(1) == target_N
        [rows] = set(prepared or self.prepare(batches, 0))
        loss = F.cross_entropy(logits_NK, target_N, reduction="sum") / rows
        return loss, {"accuracy": right_N.float().sum() / rows}

    def _classes(self) -> Tensor | None:
        if self.training or torch.is_grad_enabled():
            return self.method.classes()
        if self._classes_KE is None:
            self._classes_KE = self.method.classes()
        return self._classes_KE


def targets(batch: Batch) -> Tensor:
    """Return a batch's class indices [N]."""
    assert batch.target_B is not None, "the reader gives no classes"
    return batch.target_B
