"""The dual-encoder export through transformers' own eyes, offline."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from torch.nn import functional as F

from pretrain import export, pretrained, recipe, verification
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.data import tokenizer
from pretrain.exports import base
from pretrain.models import text
from pretrain.pretrained import Pretrained
from tests import tiny

FOUR = transformers.__version__.startswith("4.")
five = pytest.mark.skipif(FOUR, reason="the dual encoder of transformers 4 cannot call CLIP's text model")
LINES = ["a picture of one red circle", "two blue squares", "It's 42!", ""]


@pytest.fixture(autouse=True, scope="module")
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def conv() -> Pretrained:
    """Return a convolutional tower with group norm and arguments of its own, as the demo's."""
    section = tiny.conv_section()
    section.vision.name, section.vision.args = "test_efficientnet_gn", {"channel_multiplier": 1.5}
    return tiny.pretrained_model(section)


def locked(folder: Path, *, pool: str, model: type = transformers.BertModel) -> Pretrained:
    """Return LiT's kind: a trunk with batch norm beside a transformers encoder, projections alone to train."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(1)
    model(model.config_class(vocab_size=700, initializer_range=0.3, **small)).save_pretrained(folder)
    section = tiny.conv_section()
    section.vision.name, section.vision.frozen = "test_efficientnet", True
    section.text = text.Config(name=f"hf:{folder}", context_length=12, pool=pool, frozen=True)
    words = tokenizer.load(word_pieces(folder / "tokenizer"))
    made = recipe.build_model(section, words)
    return pretrained.build(section, words, made.state_dict(), source="tests")


def word_pieces(folder: Path) -> Path:
    """Write BERT's kind of tokenizer, which pads with a token of its own."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = sorted({*" ".join(LINES).lower().replace("'", " ' ").replace("!", " !").split(), *"abcdefghij"})
    made = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate([*special, *known])})
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    (folder / "special_tokens_map.json").write_text(json.dumps(dict(zip(roles, special))))
    return folder


@torch.no_grad()
def compare(model: Pretrained, folder: Path) -> None:
    """Compare from words and pictures to logits, as a user of transformers comes by them."""
    theirs = transformers.VisionTextDualEncoderModel.from_pretrained(folder).eval()
    processor = transformers.VisionTextDualEncoderProcessor.from_pretrained(folder, backend="pil")
    pictures = [p for p in verification.drawn().pictures if p.size[0] == p.size[1]]
    found = processor(text=LINES, images=pictures, return_tensors="pt", padding=True, truncation=True)
    pixels_NCHW = torch.stack([base.our_pixels(model, picture) for picture in pictures])
    assert torch.equal(found.pixel_values, pixels_NCHW)
    ids = model.tokenizer.encode_batch(LINES, model.config.text.context_length)
    longest = max(len(row) for row in ids)
    tokens_BT = torch.tensor([row + [model.tokenizer.pad] * (longest - len(row)) for row in ids])
    assert torch.equal(found.input_ids, tokens_BT)
    ours, out = model.model(Batch(keys=[], image_NCHW=pixels_NCHW, tokens_BT=tokens_BT)), theirs(**found)
    assert (out.image_embeds - ours.image).abs().max() <= 1e-5
    assert (out.text_embeds - ours.text).abs().max() <= 1e-5
    logits_NB = ours.scale * ours.image @ ours.text.T
    assert (out.logits_per_image - logits_NB).abs().max() <= 1e-5 * ours.scale
    assert F.cosine_similarity(ours.text[:1], ours.text[1:2]).item() < 0.999, "the comparison would see nothing"


@five
def test_a_conv_tower_with_the_native_text_tower(tmp_path):
    model, out = conv(), tmp_path / "out"
    found = export.export(model, out, format="dual_encoder")
    assert max(found["image_features"], found["text_features"]) <= 1e-5 and found["pixels"] == 0
    compare(model, out)
    again = pretrained.load(out)
    same = {"tokenizer": "", "logit_scale": 0.0}
    assert again.config.model_copy(update=same) == model.config.model_copy(update=same)
    assert (again.weights_hash, again.tokenizer.fingerprint) == (model.weights_hash, model.tokenizer.fingerprint)


@five
def test_a_vit_and_its_image_size_travel(tmp_path):
    model = tiny.pretrained_model(tiny.vit_section())
    export.export(model, tmp_path / "out", format="dual_encoder")
    again = pretrained.load(tmp_path / "out")
    assert again.weights_hash == model.weights_hash and again.config.vision == model.config.vision


@five
def test_the_model_card_runs(tmp_path):
    export.export(conv(), tmp_path / "out", format="dual_encoder")
    snippet = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor([[0.")


@pytest.mark.parametrize("encoder", [transformers.BertModel, transformers.MPNetModel])
def test_a_bert_pooled_at_its_first_token(tmp_path, encoder):
    model = locked(tmp_path / "encoder", pool="cls", model=encoder)
    found = export.export(model, tmp_path / "out", format="dual_encoder")
    assert found["text_features"] <= 1e-5
    shutil.rmtree(tmp_path / "encoder")
    compare(model, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"only timm_wrapper with clip_text_model is read back"):
        pretrained.load(tmp_path / "out")


def test_what_the_library_pools_otherwise_is_refused(tmp_path):
    mean = locked(tmp_path / "mean", pool="mean")
    with pytest.raises(ConfigError, match=r"never the mean over tokens.*--format diptych holds"):
        export.export(mean, tmp_path / "out", format="dual_encoder")
    plain = locked(tmp_path / "plain", pool="cls", model=transformers.ElectraModel)
    with pytest.raises(ConfigError, match=r"ElectraModel has not BERT's pooler"):
        export.export(plain, tmp_path / "out", format="dual_encoder")
    padded = tiny.conv_section()
    padded.text = text.Config(name=f"hf:{tmp_path / 'plain'}", context_length=12, pool="cls")
    with pytest.raises(ConfigError, match=r"pads with its end token"):
        export.export(tiny.pretrained_model(padded), tmp_path / "out", format="dual_encoder")
    section = tiny.conv_section()
    section.logit_bias = -10.0
    with pytest.raises(ConfigError, match=r"no place for model.logit_bias"):
        export.export(tiny.pretrained_model(section), tmp_path / "out", format="dual_encoder")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not FOUR, reason="transformers 5 can")
def test_transformers_4_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r'pip install "transformers>=5"'):
        export.export(conv(), tmp_path / "out", format="dual_encoder")


@five
def test_a_dual_encoder_of_others_is_refused(tmp_path):
    export.export(conv(), tmp_path / "out", format="dual_encoder")
    path = tmp_path / "out" / "config.json"
    tree = json.loads(path.read_text())
    del tree["vision_config"]["image_size"]
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="no export of ours"):
        pretrained.load(tmp_path / "out")
