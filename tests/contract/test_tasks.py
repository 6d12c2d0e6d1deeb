"""Every fine-tuning task, found by its file name, and every (method, task) pair whose kinds agree, end to end."""

import json
from pathlib import Path

import pytest

from finetune import delta, main
from pretrain import config, pretrained, registry
from pretrain.config import ConfigError, Section
from pretrain.report import scores
from tests import tiny

TASKS = registry.names("finetune.tasks")
METHODS = registry.names("finetune.methods")


DATA = {"classify": tiny.class_folders, "retrieve": tiny.pairs}  #: what tasks of a kind read


def recipe_file(folder, *, method: str, task: str):
    plug = registry.find("finetune.tasks", task)
    export, data = tiny.export(folder / "export"), DATA[plug.Task.kind](folder / "mine")
    shots = "shots: 2, " if "shots" in plug.Config.model_fields else ""
    tree = f"""
base: {export}
run: {{name: {method}_{task}, dir: {folder}/runs}}
method: {{name: {method}}}
task: {{name: {task}, data: {data}, {shots}batch_size: 4}}
data: {{workers: 0}}
train: {{steps: 3, batch_size: 4}}
optim: {{optimizer: sgd, lr: 0.1, schedule: epoch_cosine, grad_clip: 0}}
monitor: {{log_every: 1, tensorboard: false}}
"""
    path = folder / f"{method}_{task}.yaml"
    path.write_text(tree)
    return path


@pytest.mark.parametrize("name", TASKS)
def test_says_what_it_is(name):
    plug = registry.find("finetune.tasks", name)
    assert plug.__doc__ and issubclass(plug.Config, Section)
    assert plug.Task.kind and plug.Task.metric and plug.Task.reader in registry.names("pretrain.data.readers")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_pair_that_fits_runs(method, task, tmp_path, ranks):
    if registry.find("finetune.tasks", task).Task.kind not in registry.find("finetune.methods", method).Method.serves:
        pytest.skip(f"{method} does not serve {task}")
    file = recipe_file(tmp_path, method=method, task=task)
    assert ranks.run(1, start, str(file)) == [0]
    run = tmp_path / "runs" / f"{method}_{task}"
    found = scores.newest(run)
    assert {score.count for _, score in found.values()} == {15}
    assert any(name.startswith(f"{task}/zero_shot") for name in found)
    assert f"{task}/{registry.find('finetune.tasks', task).Task.metric}" in found
    lines = (run / "evals.jsonl").read_text()
    assert delta.read(run / delta.FILE, pretrained.load(tmp_path / "export"))
    assert ranks.run(1, start, str(file)) == [0]  # a finished run says its result again, and changes nothing
    assert (run / "evals.jsonl").read_text() == lines


def start(file: str, *words: str) -> int:
    """Run finetune/main.py's body inside a rank of the pool."""
    import torch

    return main.run(config.load(main.Recipe, file, words), torch.device("cpu"))


@pytest.mark.parametrize("config_name", sorted(p.stem for p in Path("finetune/configs").glob("*.yaml")))
def test_shipped_configs_load_and_dump_to_themselves(config_name):
    section = config.load(main.Recipe, f"finetune/configs/{config_name}.yaml")
    tree = config.yaml.safe_load(config.dump(section))
    assert config.build(main.Recipe, tree) == section


def test_published_length_where_the_config_gives_none(tmp_path):
    file = recipe_file(tmp_path, method="coop", task="few_shot")
    words = ["train.steps=null", "task.shots=1"]
    assert config.load(main.Recipe, file, words).train.epochs == 50
    assert config.load(main.Recipe, file, ["train.steps=7"]).train.epochs is None


@pytest.mark.parametrize(
    "words, message",
    [
        (["method.name=coopp"], "Did you mean 'coop'"),
        (["method.name=null"], "method.name: say which"),
        (["task.name=few_shots"], "Did you mean 'few_shot'"),
        (["method.lenght=4"], "unknown key 'lenght'"),
        (["data.shards=[a.tar]"], "use task.data instead of data.shards"),
        (["data.blend=[{shards: a.tar}]"], "use task.data instead of data.blend"),
        (["base=null"], "base"),
    ],
)
def test_mistakes_are_sentences(words, message, tmp_path):
    file = recipe_file(tmp_path, method="coop", task="few_shot")
    with pytest.raises(ConfigError, match=message):
        config.load(main.Recipe, file, words)


def test_schema_knows_every_plug_in():
    text = json.dumps(main.recipe.schema())
    assert "per_class" in text and "max_iterations" in text and "shots" in text
