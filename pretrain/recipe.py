"""The whole config, and how its parts are built; shared by pretraining, evaluation, export and fine-tuning."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from pretrain import config, dist, registry
from pretrain.config import Section
from pretrain.data import loader, stream, tokenizer
from pretrain.data.compose import Composer
from pretrain.data.regions import Config as Regions
from pretrain.data.seq2seq import Seq2SeqComposer
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.transforms import Transform
from pretrain.engine import deferred
from pretrain.engine.checkpoint import Config as Checkpoint
from pretrain.engine.deepspeed_config import Config as Zero
from pretrain.engine.ema import Config as Ema
from pretrain.engine.monitor import Config as Monitor
from pretrain.engine.optim import Config as Optim
from pretrain.engine.profile import Config as Profile
from pretrain.engine.rollback import Config as Faults
from pretrain.engine.steps import Config as Train
from pretrain.engine.stragglers import Config as Stragglers
from pretrain.engine.watchdog import Config as Watchdog
from pretrain.evals import base as eval_base
from pretrain.evals.base import Config as EvalConfig
from pretrain.models import base as models
from pretrain.models import vlm
from pretrain.objectives import base as objective_base
from pretrain.objectives.base import Mixture

#: files of pretrain/models that are whole models; the others are their parts
MODELS = ("vlm", "coca", "vlt5", "ofa")


class Run(Section):
    """`run:` where a run leaves what it makes, and the seed that all its randomness derives from."""

    name: str = Field(min_length=1)
    dir: str = "runs"
    seed: int = 0

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.dir) / self.name


def plug_ins(package: str, sections: Mapping[str, Any]) -> dict[str, Section]:
    """Return each named plug-in's validated section.

    Raises:
        ConfigError: unknown plug-in or key; the message names the nearest.
    """
    out = {}
    for name, tree in sections.items():
        if isinstance(tree, Section):
            out[name] = tree
            continue
        out[name] = config.build(registry.find(package, name).Config, tree or {}, where=name)
    return out


class Recipe(Section):
    """Every section of a pretraining config; the README explains each in a line."""

    run: Run
    data: loader.Config
    model: SerializeAsAny[models.Config] = Field(default_factory=vlm.Config)
    objectives: dict[str, SerializeAsAny[objective_base.Config]]
    train: Train
    optim: Optim = Field(default_factory=Optim)
    ema: Ema = Field(default_factory=Ema)
    zero: Zero = Field(default_factory=Zero)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    monitor: Monitor = Field(default_factory=Monitor)
    faults: Faults = Field(default_factory=Faults)
    watchdog: Watchdog = Field(default_factory=Watchdog)
    stragglers: Stragglers = Field(default_factory=Stragglers)
    profile: Profile = Field(default_factory=Profile)
    evals: dict[str, SerializeAsAny[EvalConfig]] = Field(default_factory=dict)

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, tree: Any) -> Section:
        return model_section(tree, where="model")

    @field_validator("objectives", mode="before")
    @classmethod
    def _objectives(cls, sections: Mapping[str, Any]) -> dict[str, Section]:
        return plug_ins("pretrain.objectives", sections)

    @field_validator("evals", mode="before")
    @classmethod
    def _evals(cls, sections: Mapping[str, Any]) -> dict[str, Section]:
        return plug_ins("pretrain.evals", sections)

    @model_validator(mode="after")
    def _regions(self) -> "Recipe":
        of = {"data": self.data, **{f"data.blend.{n}": source for n, source in enumerate(self.data.blend)}}
        show_as_many(self.model, {f"{where}.regions": section.regions for where, section in of.items()})
        show_as_many(self.model, {f"evals.{name}.regions": section.regions for name, section in self.evals.items()})
        return self


def show_as_many(model: models.Config, sections: Mapping[str, Regions | None]) -> None:
    """Fill in how many regions of a picture the model sees, in the sections of regions by their key.

    Raises:
        ConfigError: one of them says another number: an answer may name a region that the model does not see.
    """
    for where, section in sections.items():
        if section is None or model.regions is None:
            continue
        most = model.regions[0]
        if section.most not in (None, most):
            raise config.ConfigError(
                f"{where}.most: {section.most} regions, the model sees {most} (model.vision.regions); leave most out"
            )
        section.most = most


def model_section(tree: Any, *, where: str) -> models.Config:
    """Return the validated section of the model that `tree["name"]` names; none: two towers.

    Raises:
        ConfigError: an unknown model or key; the message names the nearest.
    """
    if isinstance(tree, models.Config):
        return tree
    name = str((tree or {}).get("name", "vlm"))
    if name not in MODELS:
        raise config.ConfigError(
            f"{where}.name: no model {name!r}.{registry.nearest(name, list(MODELS))} Known: {', '.join(MODELS)}"
        )
    section: models.Config = config.build(_module(name).Config, tree or {}, where=where)
    return section


def model_class(model: models.Config) -> type[models.Model]:
    """Return the class that a model section configures."""
    found: type[models.Model] = _module(model.file).Model
    return found


def _module(name: str) -> Any:
    return importlib.import_module(f"pretrain.models.{name}")


def build_composer(model: models.Config, words: Tokenizer) -> Composer:
    """Return what turns an Example's text into tokens."""
    given, written = model.lengths
    if written is None:
        return Composer(words, context_length=given, beyond=model.beyond, pictures=model.pictures)
    opening = model.opening(vocabulary(words))
    sees = {"pictures": model.pictures, "regions": model.regions is not None, "picture_codes": model.picture_codes}
    return Seq2SeqComposer(words, context_length=given, written=written, opening=opening, **sees)


def build_transform(model: models.Config) -> Transform:
    """Return what turns an Example's picture into pixels of the size that the model expects."""
    look = model.look
    return Transform(look.size, interpolation=look.interpolation)


def build_tokenizer(model: models.Config) -> Tokenizer:
    """Return the tokenizer that the model section names, with the model's own symbols."""
    return tokenizer.load(model.tokenizer).extended(model.symbols)


def build_model(model: models.Config, words: Tokenizer) -> Any:
    """Return a freshly initialised model whose vocabulary is the tokenizer's."""
    return model_class(model).build(model, vocabulary(words))


def vocabulary(words: Tokenizer) -> models.Vocabulary:
    """Return what a model must know of its tokenizer."""
    return models.Vocabulary(words.vocab_size, end=words.end, pad=words.pad, start=words.start, mask=words.mask)


def build_mixture(recipe: Recipe, words: Tokenizer) -> Mixture:
    """Return model and objectives as one module; what the model cannot serve is refused before weights are built."""
    objective_base.refuse_unserved(recipe.objectives, model_class(recipe.model).provides)
    eval_base.refuse_unserved(recipe.evals, model_class(recipe.model).provides)
    dist.seed_step(recipe.run.seed, "weights")  # the same first weights on every rank
    return objective_base.build(recipe.objectives, build_model(recipe.model, words))


def build_for_training(recipe: Recipe, words: Tokenizer) -> tuple[Mixture, deferred.Record | None]:
    """Return the mixture; with zero.init=parts without weights, and the record by which the engine makes them in parts.

    Weights of a file (model.vision.weights) are held by every rank until then.

    Raises:
        ConfigError: a part of the model cannot be built so.
    """
    if recipe.zero.init == "whole":
        return build_mixture(recipe, words), None
    if isinstance(recipe.model, vlm.Config) and recipe.model.text.name.startswith("hf:"):
        raise config.ConfigError(
            "zero.init: transformers reads the weights of model.text.name whole; set zero.init=whole, or take the "
            "native text tower"
        )
    dist.seed_step(recipe.run.seed, "weights")  # the record starts from here, as build_mixture does
    with deferred.recording() as record:
        return build_mixture(recipe, words), record


def build_loader(recipe: Recipe, words: Tokenizer) -> loader.Loader | stream.StreamLoader:
    """Return the training batches of this rank."""
    if recipe.data.order == "stream" and recipe.train.epochs and not recipe.data.samples:
        raise config.ConfigError(
            "train.epochs: with data.order=stream nobody has counted the samples; give data.samples, those of one "
            "epoch, or train.steps or train.samples instead"
        )
    refuse_misplaced(recipe)
    kind = {"exact": loader.Loader, "stream": stream.StreamLoader}[recipe.data.order]
    return kind(
        recipe.data,
        batch_size=recipe.train.batch_size,
        seed=recipe.run.seed,
        transform=build_transform(recipe.model),
        composer=build_composer(recipe.model, words),
        rank=dist.rank(),
        world=dist.world(),
    )


def refuse_misplaced(recipe: Recipe) -> None:
    """Raise a ConfigError where sources of a blend ask for what objectives or the model cannot do."""
    blend = recipe.data.blend
    if any(source.part for source in blend):
        for name in recipe.objectives:
            if issubclass(registry.find("pretrain.objectives", name).Objective, objective_base.Contrast):
                raise config.ConfigError(
                    f"objectives.{name} compares the rows of a step, and data.blend has two mini-batches a step; leave "
                    "part out, or the objective"
                )
    shown = [source.regions or recipe.data.regions for source in (blend or [recipe.data])]
    if recipe.model.regions and not any(section is not None and section.features for section in shown):
        raise config.ConfigError(
            "data.regions: model.vision.source=region sees a detector's regions, and no data gives any; set "
            "data.regions={boxes: ..., features: ...}, or take model.vision.source=grid or patch with a tower"
        )
    laid = {"data.instruction": recipe.data.instruction}
    laid |= {f"data.blend.{n}.instruction": source.instruction or {} for n, source in enumerate(blend)}
    laid |= {f"evals.{name}.instruction": section.instruction for name, section in recipe.evals.items()}
    refuse_other_grid(recipe.model, laid)
    look = recipe.model.look
    other = next((source for source in blend if source.image_size not in (None, look.size)), None)
    if other is not None and not look.sizes:
        raise config.ConfigError(
            f"data.blend: image_size {other.image_size}, but {recipe.model.name} reads pictures of {look.size} pixels "
            "alone; leave image_size out"
        )


def refuse_other_grid(model: models.Config, laid: Mapping[str, dict[str, Any]]) -> None:
    """Raise a ConfigError where an instruction names cells of another grid than the one that the model sees.

    `model` is its section, `laid` the instructions by the key that names them.
    """
    asked = {
        f"{where}.{paper}.grid": tuple(keys["grid"])
        for where, section in laid.items()
        for paper, keys in section.items()
        if keys and keys.get("grid")
    }
    sees = model.grid() if asked else None
    for where, grid in asked.items():
        if grid != sees:
            what = "names no cells of pictures" if sees is None else f"sees {sees[0]} x {sees[1]} of a picture"
            raise config.ConfigError(
                f"{where}: {grid[0]} x {grid[1]} cells, and the model {what}; "
                + ("leave it out" if sees is None else f"set it to {list(sees)}, or model.vision.cells")
            )


def architecture(recipe: Recipe, words: Tokenizer) -> dict[str, Any]:
    """Return what must not change when a run goes on: towers, vocabulary and what their outputs mean."""
    tree = recipe.model.architecture()
    return {"model": tree, "tokenizer": words.fingerprint, "objectives": sorted(recipe.objectives)}


def schema() -> dict[str, Any]:
    """Return the JSON schema of a config, every known plug-in's section included."""
    tree = Recipe.model_json_schema()
    for key, package in (("objectives", "pretrain.objectives"), ("evals", "pretrain.evals")):
        plugs = {name: registry.find(package, name).Config for name in registry.names(package)}
        tree["properties"][key] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: plug.model_json_schema() for name, plug in plugs.items()},
        }
    return tree
