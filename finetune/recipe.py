"""The whole config of a fine-tuning run; sections that pretraining has too are the same."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from finetune.methods import base as methods
from finetune.tasks import base as tasks
from pretrain import config, registry
from pretrain.config import ConfigError, Section
from pretrain.data import loader
from pretrain.data.transforms import Augment
from pretrain.engine import checkpoint
from pretrain.engine.deepspeed_config import Config as Zero
from pretrain.engine.ema import Config as Ema
from pretrain.engine.monitor import Config as Monitor
from pretrain.engine.optim import Config as Optim
from pretrain.engine.rollback import Config as Faults
from pretrain.engine.steps import Config as Train
from pretrain.engine.stragglers import Config as Stragglers
from pretrain.engine.watchdog import Config as Watchdog
from pretrain.recipe import Run


class Data(loader.Config):
    """`data:` how training samples are read; what is read, the task says."""

    shards: list[str] = []  # noqa: RUF012 (pydantic copies it)
    reader: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    lanes: int = Field(default=1, ge=1)  #: small data: one stream that is shuffled as a whole
    order: Literal["exact"] = "exact"  #: splits and shots are counted
    #: what training does to a picture; null: nothing, it is seen as an evaluation sees it, whatever `decode` says
    augment: Augment | None = None  # type: ignore[assignment]
    #: cached: features of frozen towers are computed once and kept in cache_dir, where all runs find them; with
    #: `augment`, those of evaluations only. off: computed whenever a picture is read
    features: Literal["cached", "off"] = "cached"

    @field_validator("shards", "reader", "blend", mode="before")
    @classmethod
    def _not_here(cls, value: Any, info: ValidationInfo) -> Any:
        if value:
            raise ValueError(f"the task says what is read: use task.data instead of data.{info.field_name}")
        return value

    @field_validator("features", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # which is what YAML makes of the bare word

    @model_validator(mode="after")
    def _what_is_read(self) -> "Data":
        return self  # the task names shards when the run is built


class Checkpoint(checkpoint.Config):
    """`checkpoint:` as in pretraining, without the frozen base."""

    frozen: bool = False


def plug_in(package: str, tree: Any, key: str) -> Section:
    """Return the validated section of the plug-in that `tree["name"]` names.

    Raises:
        ConfigError: no name, an unknown one, or keys that the plug-in does not have.
    """
    if isinstance(tree, Section):
        return tree
    if not isinstance(tree, Mapping) or not tree.get("name"):
        known = ", ".join(registry.names(package))
        raise ConfigError(f"{key}.name: say which, as in {key}.name=NAME. Known: {known}")
    return config.build(registry.find(package, str(tree["name"])).Config, tree, where=key)


class Recipe(Section):
    """Every section of a fine-tuning config."""

    base: str  #: what is fine-tuned: a run, an export of ours, an open_clip or a transformers folder
    method: SerializeAsAny[methods.Config]
    task: SerializeAsAny[tasks.Config]
    run: Run
    data: Data = Field(default_factory=Data)
    train: Train | None = Field(default=None, validate_default=True)  #: no length: the method's published one
    optim: Optim = Field(default_factory=Optim)
    ema: Ema = Field(default_factory=Ema)  #: with an average, it is what answers and what the delta holds
    zero: Zero = Field(default_factory=Zero)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    monitor: Monitor = Field(default_factory=Monitor)
    faults: Faults = Field(default_factory=Faults)
    watchdog: Watchdog = Field(default_factory=Watchdog)
    stragglers: Stragglers = Field(default_factory=Stragglers)

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, tree: Any) -> Section:
        return plug_in("finetune.methods", tree, "method")

    @field_validator("task", mode="before")
    @classmethod
    def _task(cls, tree: Any) -> Section:
        return plug_in("finetune.tasks", tree, "task")

    @field_validator("train", mode="before")
    @classmethod
    def _train(cls, tree: Any, info: ValidationInfo) -> Any:
        """Fill in the published number of epochs where the config gives no length."""
        method, task = info.data.get("method"), info.data.get("task")
        if isinstance(tree, Section) or method is None or task is None:
            return tree
        tree = dict(tree or {})
        plug = _plug("methods", method).Method
        epochs = None if plug.solved(method) else plug.epochs(getattr(task, "shots", None))
        if not any(tree.get(length) for length in ("steps", "samples", "epochs")) and epochs:
            tree["epochs"] = epochs
        return tree or None

    @model_validator(mode="after")
    def _agree(self) -> "Recipe":
        method, task = _plug("methods", self.method).Method, _plug("tasks", self.task).Task
        methods.refuse_task(self.method.name, task=self.task.name, kind=task.kind)
        if self.train is None and not method.solved(self.method):
            raise ValueError("train: give exactly one of train.steps, train.samples, train.epochs")
        if self.train and self.train.steps:
            self.optim.warmup_steps(self.train.steps)  # a warm-up that does not fit is refused before weights are read
        if getattr(self.method, "templates", "") is None:  # one sentence for the zero-shot score and for the method
            self.method.templates = self.task.templates  # type: ignore[attr-defined]
        return self


def _plug(kind: str, section: Any) -> Any:
    return registry.find(f"finetune.{kind}", section.name)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a config, every known method's and task's section included."""
    tree = Recipe.model_json_schema()
    for key, package in (("method", "finetune.methods"), ("task", "finetune.tasks")):
        names = registry.names(package)
        tree["properties"][key] = {"anyOf": [registry.find(package, n).Config.model_json_schema() for n in names]}
    return tree
