"""What the sections of a config say of one another: what follows is filled in, what disagrees is refused at once."""

from pathlib import Path

import pytest
import yaml

from pretrain import config, recipe
from pretrain.config import ConfigError
from pretrain.recipe import Recipe

VLT5 = Path(__file__).resolve().parents[2] / "pretrain" / "configs" / "vlt5_base.yaml"
GROUNDING = "evals={grounding: {data: a.tar, regions: {}}}"
BLEND = ("data.shards=[]", "data.blend=[{shards: a.tar, regions: {}}, {shards: b.tar}]")


def read(*words: str) -> Recipe:
    return config.load(Recipe, VLT5, words)


def test_as_many_regions_are_read_as_the_model_sees() -> None:
    made = read("model.vision.regions=12", GROUNDING, *BLEND)
    sections = (made.data.regions, made.data.blend[0].regions, made.evals["grounding"].regions)
    assert [section.most for section in sections] == [12] * 3 and made.data.blend[1].regions is None
    assert config.build(Recipe, yaml.safe_load(config.dump(made))).data.regions.most == 12, "a run's own config says it"
    tower = "{source: patch, tower: {name: vit_base_patch32_clip_224}}"
    assert read(f"model.vision={tower}", GROUNDING).evals["grounding"].regions.most is None, "cells, no detector's"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("data.regions.most=40",), "data.regions"),
        ((BLEND[0], "data.blend=[{shards: a.tar, regions: {most: 9}}]"), "data.blend.0.regions"),
        (("evals={grounding: {data: a.tar, regions: {most: 9}}}",), "evals.grounding.regions"),
    ],
)
def test_another_number_of_regions_is_refused(words: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}\.most: \d+ regions, the model sees 36 \(model.vision.regions\)"):
        read(*words)


def test_evals_of_a_trained_model_see_as_many_regions_too() -> None:
    sections = recipe.plug_ins("pretrain.evals", {"grounding": {"data": "a.tar", "regions": {}}})
    recipe.show_as_many(
        read("model.vision.regions=7").model, {"evals.grounding.regions": sections["grounding"].regions}
    )
    assert sections["grounding"].regions.most == 7


def test_a_model_of_regions_is_not_trained_blind() -> None:
    """Without a detector's regions VL-T5 would learn from texts alone, and nothing would say so."""
    without = ("data.regions=null",), ("data.regions.features=null",)
    without += (("data.regions=null", BLEND[0], "data.blend=[{shards: a.tar}]"),)
    for words in without:
        with pytest.raises(ConfigError, match=r"data\.regions: model\.vision\.source=region sees a detector's regions"):
            recipe.refuse_misplaced(read(*words))
    recipe.refuse_misplaced(read(*BLEND, "data.regions=null"))
    recipe.refuse_misplaced(read(BLEND[0], "data.blend=[{shards: a.tar}]"))
    recipe.refuse_misplaced(read("model.vision={source: patch, tower: {}}", "data.regions=null"))


def test_the_grid_that_is_named_is_the_one_that_is_seen() -> None:
    """The fourth of four cells would else be the fourth of the sixteen that the model sees."""
    vit = "{name: vit_base_patch32_clip_224, image_size: 64, args: {embed_dim: 16, depth: 1, num_heads: 2}}"
    tower = (f"model.vision={{source: patch, tower: {vit}}}", "data.regions=null")
    asked = "data.instruction={vlt5: {tasks: [refcocog], grid: [2, 2]}}"
    recipe.refuse_misplaced(read(*tower, asked))
    with pytest.raises(ConfigError, match=r"data\.instruction\.vlt5\.grid: 2 x 2 cells, and the model sees 1 x 1"):
        recipe.refuse_misplaced(read(*tower, "model.vision.cells=1", asked))
    with pytest.raises(ConfigError, match=r"2 x 2 cells, and the model names no cells of pictures; leave it out"):
        recipe.refuse_misplaced(read(asked))
    late = "evals={grounding: {data: a.tar, instruction: {vlt5: {tasks: [refcocog], grid: [3, 3]}}}}"
    with pytest.raises(ConfigError, match=r"evals\.grounding\.instruction\.vlt5\.grid: 3 x 3 cells"):
        recipe.refuse_misplaced(read(*tower, late))
