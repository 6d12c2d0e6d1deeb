"""The loader's promises: every mistake is one sentence with the dotted key and the nearest known name."""

from pathlib import Path

import pytest
from pydantic import Field

from pretrain import config
from pretrain.config import ConfigError, Section


class Optim(Section):
    lr: float = 1e-3
    warmup: int = Field(default=0, ge=0)


class Tree(Section):
    name: str
    optim: Optim = Field(default_factory=Optim)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tree.yaml"
    path.write_text("name: icons\noptim: {lr: 5e-4}\n")
    return path


def test_overrides_and_round_trip(file: Path) -> None:
    tree = config.load(Tree, file, ["optim.warmup=7", "name=other"])
    assert (tree.name, tree.optim.lr, tree.optim.warmup) == ("other", 5e-4, 7)
    file.write_text(config.dump(tree))
    assert config.load(Tree, file) == tree


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optim.warmpu=7"], r"unknown key 'optim\.warmpu'\. Did you mean 'warmup'\?"),
        (["optin.lr=1"], r"unknown key 'optin'\. Did you mean 'optim'\?"),
        (["optim.warmup=-1"], r"optim\.warmup: .*greater than or equal to 0 \(got -1\)"),
        (["optim.warmup=soon"], r"optim\.warmup: .*integer.*'soon'"),
        (["optim.lr"], r"write it as section\.key=value"),
        (["optim.lr=[1,"], "not YAML"),
    ],
)
def test_mistakes_on_the_command_line(file: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config.load(Tree, file, words)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {}", r"name: Field required"),
        ("[1, 2]", "expected sections"),
        ("name: a\nname: b", "'name' is given twice"),
        ("name: [", "not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_mistakes_in_the_file(file: Path, text: str, sentence: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        config.load(Tree, file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        config.load(Tree, tmp_path / "nowhere.yaml")


def test_assignment_is_validated() -> None:
    tree = Tree(name="a")
    with pytest.raises(ValueError, match="warmup"):
        tree.optim.warmup = -3
