"""One function reads a model from a run, a checkpoint and the folders of other libraries."""

import json
import shutil

import open_clip
import pytest
import torch
from transformers import CLIPModel

from pretrain import export, main, pretrained
from pretrain.config import ConfigError
from pretrain.engine.checkpoint import CheckpointError
from pretrain.models import text
from tests import tiny


def train(config: str) -> None:
    main.main(["--config", config])


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ranks.run(1, train, str(tiny.config_file(folder)))
    shutil.rmtree(folder / "tokenizer")  # a run carries its own
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "export"
    export.export(tiny.pretrained_model(tiny.vit_section()), folder, format="hf")
    return folder


def test_run_and_checkpoint(run):
    newest, first = pretrained.load(run), pretrained.load(run, step=2)
    assert newest.source.endswith("step-00000004") and first.source.endswith("step-00000002")
    assert newest.weights_hash != first.weights_hash
    assert pretrained.load(run / "checkpoints" / "step-00000002").weights_hash == first.weights_hash
    assert newest.config.text.vocab_size == newest.tokenizer.vocab_size
    assert newest.transform.size == 32 and newest.composer.context_length == 16
    with pytest.raises(ConfigError, match=r"no complete checkpoint of step 3; there: 4, 2"):
        pretrained.load(run, step=3)
    with pytest.raises(ConfigError, match="is one checkpoint"):
        pretrained.load(run / "checkpoints" / "step-00000002", step=2)


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    part = next((copy / "checkpoints" / "step-00000004").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"step-00000004.*use another step"):
        pretrained.load(copy)
    (copy / "checkpoints" / "step-00000004" / "COMPLETE").unlink()
    assert pretrained.load(copy).source.endswith("step-00000002")


def test_a_run_exports(run, tmp_path):
    export.main([str(run), str(tmp_path / "out"), "--format", "open_clip"])
    assert pretrained.load(tmp_path / "out").weights_hash == pretrained.load(run).weights_hash


def test_unknown_folders(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        pretrained.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="not a folder of a model that we know"):
        pretrained.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="no complete checkpoint yet"):
        pretrained.load(tmp_path)


def test_transformers_own_save(hf, tmp_path):
    """As save_pretrained writes it: in pieces, in half precision; and as 4.x did."""
    known = pretrained.load(hf)
    folder = shutil.copytree(hf, tmp_path / "saved")
    (folder / "model.safetensors").unlink()
    CLIPModel.from_pretrained(hf).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert pretrained.load(folder).weights_hash == known.weights_hash

    for path in folder.glob("model*"):
        path.unlink()
    (folder / "processor_config.json").unlink()
    torch.save(CLIPModel.from_pretrained(hf).state_dict(), folder / "pytorch_model.bin")
    assert pretrained.load(folder).weights_hash == known.weights_hash

    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"no weights; expected model\.safetensors"):
        pretrained.load(folder)


def change(path, function) -> None:
    tree = json.loads(path.read_text())
    function(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("config.json", lambda t: t["text_config"].update(eos_token_id=7), "pools at token 7"),
        ("config.json", lambda t: t.update(model_type="bert"), "model_type 'bert' is not 'clip'"),
        ("config.json", lambda t: t["vision_config"].update(hidden_act="relu"), "neither gelu nor quick_gelu"),
        ("processor_config.json", lambda t: t["image_processor"].update(size={"height": 32, "width": 32}), "shortest"),
    ],
)
def test_folders_that_would_be_misread_are_refused(hf, tmp_path, file, edit, message):
    folder = shutil.copytree(hf, tmp_path / "copy")
    change(folder / file, edit)
    with pytest.raises(ConfigError, match=message):
        pretrained.load(folder)


def test_the_old_end_token_of_transformers(hf, tmp_path):
    """Files of OpenAI's models say 2 and mean the largest id."""
    folder = shutil.copytree(hf, tmp_path / "copy")
    change(folder / "config.json", lambda t: t["text_config"].update(eos_token_id=2))
    assert pretrained.load(folder).weights_hash == pretrained.load(hf).weights_hash


def test_open_clip_pickle(tmp_path):
    """A folder as open_clip's trainer leaves it: a checkpoint with its optimizer, wrapped names, its own tokenizer."""
    cfg = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    theirs = open_clip.CLIP(**cfg)
    wrapped = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": wrapped}, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    found = pretrained.load(tmp_path)
    assert found.tokenizer.end == 49407 and found.config.tokenizer == "clip"
    image_NCHW = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        ours = found.model.vision(image_NCHW).image_NE
        assert torch.allclose(ours, theirs.eval().encode_image(image_NCHW), atol=1e-5)


def test_a_transformers_text_tower_travels_with_our_own_export(tmp_path):
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=700, **small)).save_pretrained(tmp_path / "bert")
    section = tiny.conv_section()
    section.text = text.Config(name=f"hf:{tmp_path / 'bert'}", context_length=12)
    model = tiny.pretrained_model(section)
    found = export.export(model, tmp_path / "out", format="diptych")
    assert found["text_features"] <= 1e-5
    shutil.rmtree(tmp_path / "bert")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert pretrained.load(tmp_path / "moved").weights_hash == model.weights_hash
    with pytest.raises(ConfigError, match="text tower"):
        export.export(model, tmp_path / "other", format="open_clip")


def test_damaged_weights_are_named(hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "copy")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        pretrained.load(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(whole)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read"):
        pretrained.load(folder)


class Trap:
    """What a pickle could run."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


def test_a_pickle_runs_nothing(hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read"):
        pretrained.load(folder)


def test_a_config_without_towers_is_refused(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 8}}))
    with pytest.raises(ConfigError, match="needs embed_dim, vision_cfg and text_cfg"):
        pretrained.load(tmp_path)
