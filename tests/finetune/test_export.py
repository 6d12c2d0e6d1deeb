"""What a method trained goes into an export where there is a place for it."""

import pytest
import torch

from finetune import delta, export
from finetune.methods import coop, full, lora
from pretrain import pretrained
from pretrain.config import ConfigError
from tests import tiny

NAMES = ["red circle", "blue square", "green ring"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.export(tmp_path_factory.mktemp("export"))


def a_run(folder, base, plug, **keys):
    """Write what a run leaves, with weights as after training; return its folder and the method."""
    loaded = pretrained.load(base)
    section = plug.Config(name=plug.__name__.rpartition(".")[2], **keys)
    torch.manual_seed(0)
    made = plug.Method(section, loaded, NAMES).eval()
    with torch.no_grad():
        for p in made.trained().values():
            p.add_(0.1 * torch.randn(p.shape))
    delta.write(folder / delta.FILE, made.state(), pretrained=loaded, method=section, names=NAMES)
    (folder / "config.yaml").write_text(
        f"base: {base}\nrun: {{name: r}}\nmethod: {{name: {section.name}}}\n"
        "task: {name: few_shot, data: x}\ntrain: {steps: 1}\n"
    )
    return folder, made


@pytest.mark.check("lora", 3)
@pytest.mark.parametrize("plug, keys", [(lora, {"roles": ["q", "v", "up"]}), (full, {"towers": "both"})])
def test_merged_and_verified(plug, keys, base, tmp_path, capsys):
    run, made = a_run(tmp_path, base, plug, **keys)
    assert export.main([str(run), str(tmp_path / "out"), "--format", "diptych"]) == 0
    assert "verified" in capsys.readouterr().out
    found, batch = pretrained.load(tmp_path / "out"), tiny.batch()
    with torch.no_grad():
        torch.testing.assert_close(found.model(batch).image, made.model(batch).image, rtol=0, atol=2e-6)
        torch.testing.assert_close(found.model(batch).text, made.model(batch).text, rtol=0, atol=2e-6)
    assert found.weights_hash != pretrained.load(base).weights_hash


@pytest.mark.check("full", 4)
def test_another_mixture_is_exported_without_training(base, tmp_path):
    run, _ = a_run(tmp_path, base, full, wise=0.5)
    assert export.main([str(run), str(tmp_path / "out"), "--format", "diptych", "method.wise=0.0"]) == 0
    assert pretrained.load(tmp_path / "out").weights_hash == pretrained.load(base).weights_hash


def test_what_has_no_place_is_refused(base, tmp_path, capsys):
    run, _ = a_run(tmp_path, base, coop, length=4)
    with pytest.raises(SystemExit) as left:
        export.main([str(run), str(tmp_path / "out"), "--format", "diptych"])
    assert left.value.code == 2 and "has no place in a model of two towers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"python -m finetune\.evaluate"):
        pretrained.load(run)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a fine-tuned run that has come to its end"):
        export.merged(tmp_path, [])
