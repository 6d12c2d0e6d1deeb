"""Every shipped config: says its command, loads, prints to itself, trains two steps, and fits together whole."""

from pathlib import Path

import pytest

from finetune.methods import base as methods
from finetune.recipe import Recipe as FinetuneRecipe
from pretrain import config, registry
from pretrain.models import base as models
from pretrain.models import ofa
from pretrain.planning import rehearsal
from pretrain.recipe import Recipe
from tests import tiny
from tests.end_to_end import quilts
from tests.end_to_end.jobs import losses, pretrain

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = sorted((ROOT / "pretrain/configs").glob("*.yaml"))
FINETUNE = sorted((ROOT / "finetune/configs").glob("*.yaml"))


def head(path: Path) -> str:
    """Return the comment at the top."""
    lines = path.read_text().splitlines()
    return "\n".join(line for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))])


@pytest.mark.parametrize("path", PRETRAIN + FINETUNE, ids=lambda p: p.stem)
def test_config(path: Path, tmp_path: Path) -> None:
    section = FinetuneRecipe if path in FINETUNE else Recipe
    loaded = config.load(section, path)
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(loaded))
    assert config.load(section, again) == loaded
    assert f"{path.parent.parent.name}/main.py --config {path.relative_to(ROOT)}" in head(path), "say the command"
    assert loaded.run.name == path.stem, "a run is called as its config is"


def shallow(section: models.Config) -> list[str]:
    """Return words that leave a large model all but its depth and vocabulary; none for one that is small as it is."""
    if isinstance(section, ofa.Config):  # whose depth is its size
        return ["model.size=tiny", "model.image_size=64", "model.sample_patches=9", "model.codes=16"]
    words = []
    vision, text, fusion = (getattr(section, part, None) for part in ("vision", "text", "fusion"))
    if (getattr(vision, "name", "") or "").startswith("vit_") and "depth" not in vision.args:
        words.append("model.vision.args.depth=2")
    if text is not None and getattr(text, "layers", 0) > 3 and not getattr(text, "name", "").startswith("hf:"):
        words += ["model.text.layers=2", "model.text.vocab_size=null"]
    if fusion is not None and fusion.layers > 2:
        words.append("model.fusion.layers=1")
    return words


@pytest.mark.slow
@pytest.mark.parametrize("path", PRETRAIN, ids=lambda p: p.stem)
def test_two_steps(ranks, path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Real ones; of a large model's blocks there are two, since all are alike: its depth is the next test's."""
    folder = tiny.corpus(tmp_path)
    words = [
        f"data.shards={folder}/shapes-{{00000..00001}}.tar", "data.reader={caption: {}}", "data.workers=0",
        f"run.dir={tmp_path}", "train.epochs=null", "train.steps=2", "train.batch_size=4", "optim.warmup=1",
        "evals={}", "monitor.tensorboard=false",
    ]  # fmt: skip
    loaded = config.load(Recipe, path)
    section = loaded.model
    if "matching" in loaded.objectives:
        words += ["objectives.matching.among=2"]
    if loaded.data.regions:  # a detector has looked at these made-up pictures
        words += [f"data.shards={quilts.write(folder)}", "data.regions.unit=fractions"]
        words += [f"model.vision.width={len(quilts.GERMAN)}"]
    vision = getattr(section, "vision", None)
    if vision is not None and getattr(vision, "weights", None):  # trained elsewhere, with the tokenizer that is theirs
        towers = request.getfixturevalue("real_towers")
        words += [f"model.vision.weights={towers / Path(section.vision.weights).name}"]
        words += [f"model.text.name=hf:{towers / 'minilm'}", f"model.tokenizer={towers / 'minilm'}"]
    else:
        words += [f"model.tokenizer={folder}/tokenizer"]
    ranks.run(1, pretrain, path, *words, *shallow(section), timeout=300)
    assert set(losses(tmp_path / path.stem)) >= {1, 2}


def deep() -> list[Path]:
    """Return the configs of models that the test above makes shallow; OFA's sizes are built in test_ofa.py."""
    sections = {path: config.load(Recipe, path).model for path in PRETRAIN}
    return [path for path, section in sections.items() if shallow(section) and not isinstance(section, ofa.Config)]


@pytest.mark.slow
@pytest.mark.parametrize("path", deep(), ids=lambda p: p.stem)
def test_a_step_at_full_depth(path: Path) -> None:
    """Forward and backward of the whole model, on tensors that have shapes but no contents."""
    recipe = config.load(Recipe, path, ["train.batch_size=4"])
    size = recipe.model.vocabulary_size or 49_408
    words = models.Vocabulary(size, end=size - 1, pad=0, start=0, mask=0)
    step = rehearsal.rehearse(recipe, words, rows=4, length=recipe.model.lengths[0])
    assert step.trained > 0 and step.flops > 0


@pytest.mark.parametrize("path", FINETUNE, ids=lambda p: p.stem)
def test_a_method_fits_the_base_that_its_config_names(path: Path, tmp_path: Path) -> None:
    """Built on an untrained model of the base's shape: a tower without a place for the method is refused there."""
    loaded = config.load(FinetuneRecipe, path)
    section = config.load(Recipe, ROOT / f"pretrain/configs/{Path(loaded.base).name}.yaml").model
    base = tiny.pretrained_model(section)
    methods.refuse_base(loaded.method.name, base.config)
    method = registry.find("finetune.methods", loaded.method.name).Method(loaded.method, base, ["a cat", "a dog"])
    assert methods.Finetune(method).method.trained()
