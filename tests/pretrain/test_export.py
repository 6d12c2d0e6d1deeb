"""Exports through the eyes of the libraries that they are for, offline."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from pretrain import export, pretrained, registry, verification
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.data import synthetic, tokenizer
from pretrain.exports import base
from pretrain.exports import open_clip as open_clip_format
from pretrain.verification import ExportError
from tests import tiny
from tests.pretrain.models import test_ofa, tiny_vlt5

FORMATS = registry.names("pretrain.exports")


@pytest.fixture(autouse=True, scope="module")
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # for processes; the library here has read it already
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def vit():
    return tiny.pretrained_model(tiny.vit_section())


@pytest.fixture(scope="module")
def conv():
    return tiny.pretrained_model(tiny.conv_section())


@pytest.fixture(scope="module")
def wide():
    """A tower with arguments of its own."""
    section = tiny.conv_section()
    section.vision.name, section.vision.args = "test_efficientnet_gn", {"channel_multiplier": 1.5}
    return tiny.pretrained_model(section)


@pytest.fixture(scope="module")
def folders(vit, conv, wide, tmp_path_factory):
    """Each export once: (tower, format) -> folder."""
    root = tmp_path_factory.mktemp("exports")
    made = {("vit", "hf"): vit, ("vit", "open_clip"): vit, ("conv", "open_clip"): conv, ("conv", "diptych"): conv}
    made["wide", "open_clip"] = wide
    for (tower, name), model in made.items():
        found = export.export(model, root / f"{tower}_{name}", format=name)
        assert max(found["image_features"], found["text_features"]) <= 1e-5
    return {pair: root / f"{pair[0]}_{pair[1]}" for pair in made}


def captions(count: int) -> list[str]:
    """Return sentences of known and unknown words, with punctuation, digits and capitals."""
    rng = np.random.Generator(np.random.Philox(key=5))
    words = [*" ".join(synthetic.CLASSES).split(), "don't", "42", "snow-white", "(zoom)", "Café", "A", "it's", "naïve!"]
    return [" ".join(rng.choice(words, size=int(rng.integers(1, 9)))) for _ in range(count)]


def pictures(size: int, *, count: int = 8) -> list[Image.Image]:
    """Return smooth pictures whose excess over the square is even, larger and smaller than `size`."""
    rng = np.random.Generator(np.random.Philox(key=6))
    shapes = [(size, size), (2 * size, 2 * size), (3 * size, 2 * size), (size // 2, size)]
    drawn = [synthetic.draw(label, size=4 * size, rng=rng) for label in synthetic.CLASSES[:count]]
    return [image.resize(shapes[i % 4], Image.Resampling.BICUBIC) for i, image in enumerate(drawn)]


def ours(model, pixels_NCHW, lines):
    """Return our features and logits, and the padded ids."""
    length = model.config.text.context_length
    ids = model.tokenizer.encode_batch(lines, length)
    tokens_BT = torch.tensor([row + [model.tokenizer.pad] * (length - len(row)) for row in ids])
    out = model.model(Batch(keys=[], image_NCHW=pixels_NCHW, tokens_BT=tokens_BT))
    return out.image, out.text, out.scale * out.image @ out.text.T, tokens_BT


@torch.no_grad()
def test_transformers_folder(folders, vit):
    folder = folders["vit", "hf"]
    theirs, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    lines, images = captions(200), pictures(32)
    pixels_NCHW = torch.stack([base.our_pixels(vit, image) for image in images])
    image_NE, text_BE, logits_NB, tokens_BT = ours(vit, pixels_NCHW, lines)

    found = processor(text=lines, return_tensors="pt", padding="max_length", truncation=True)
    assert torch.equal(found.input_ids, tokens_BT)
    out = theirs(**found, pixel_values=pixels_NCHW)
    assert (out.image_embeds - image_NE).abs().max() <= 1e-5
    assert (out.text_embeds - text_BE).abs().max() <= 1e-5
    assert (out.logits_per_image - logits_NB).abs().max() <= 1e-5 * vit.model.scale

    raw = theirs(**processor(text=lines[:1], images=images, return_tensors="pt"))
    assert F.cosine_similarity(raw.image_embeds, image_NE).min() >= 0.9999
    assert (theirs.config.text_config.eos_token_id, theirs.logit_scale.ndim) == (vit.tokenizer.end, 0)


def test_a_moved_open_clip_folder_still_loads_here(folders, wide, tmp_path):
    moved = shutil.copytree(folders["wide", "open_clip"], tmp_path / "moved")
    assert pretrained.load(moved).weights_hash == wide.weights_hash


@pytest.mark.parametrize("tower", ["vit", "conv", "wide"])
@torch.no_grad()
def test_open_clip_folder(folders, tower, request):
    model = request.getfixturevalue(tower)
    folder = folders[tower, "open_clip"]
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    theirs.eval()
    lines, images = captions(200), pictures(32)
    pixels_NCHW = torch.stack([base.our_pixels(model, image) for image in images])
    assert torch.equal(torch.stack([preprocess(image) for image in images]), pixels_NCHW)
    image_NE, text_BE, logits_NB, tokens_BT = ours(model, pixels_NCHW, lines)
    assert torch.equal(words(lines), tokens_BT)
    assert (theirs.encode_image(pixels_NCHW, normalize=True) - image_NE).abs().max() <= 1e-5
    assert (theirs.encode_text(tokens_BT, normalize=True) - text_BE).abs().max() <= 1e-5
    assert (theirs.get_logits(pixels_NCHW, tokens_BT)[0] - logits_NB).abs().max() <= 1e-5 * model.model.scale


@pytest.mark.parametrize("pair", [("vit", "hf"), ("vit", "open_clip"), ("conv", "open_clip"), ("conv", "diptych")])
def test_an_export_is_loaded_again_as_the_same_model(folders, pair, request):
    model = request.getfixturevalue(pair[0])
    found = pretrained.load(folders[pair])
    assert found.weights_hash == model.weights_hash
    assert found.tokenizer.fingerprint == model.tokenizer.fingerprint
    same = {"tokenizer": "", "logit_scale": 0.0}
    assert found.config.model_copy(update=same) == model.config.model_copy(update=same)
    assert not found.model.training


@pytest.mark.parametrize("pair", [("vit", "hf"), ("vit", "open_clip"), ("conv", "diptych")])
def test_the_model_card_runs(folders, pair):
    folder = folders[pair]
    card = (folder / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", snippet], cwd=folder.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor([[0.")
    assert pretrained.load(folder).weights_hash in card


def test_files_of_both_releases_of_transformers(folders):
    names = {path.name for path in folders["vit", "hf"].iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "README.md",
    }  # fmt: skip
    modes = {path.stat().st_mode for path in folders["vit", "hf"].iterdir()}
    assert len(modes) == 1, "safetensors files may be read by whom the others may"


def test_a_conv_tower_does_not_fit_transformers(conv, tmp_path):
    with pytest.raises(ConfigError, match=r"CLIPModel holds only CLIP's own ViT.*--format open_clip"):
        export.export(conv, tmp_path / "out", format="hf")
    assert not list(tmp_path.iterdir())


def test_the_standard_tokenizer_is_left_to_open_clip(tmp_path):
    section = tiny.vit_section()
    section.text.vocab_size, section.text.context_length, section.tokenizer = None, 20, "clip"
    words = tokenizer.load("clip")
    section.text.width, section.text.heads = 16, 2
    made = pretrained.recipe.build_model(section, words)
    model = pretrained.build(section, words, made.state_dict(), source="tests")
    export.export(model, tmp_path / "out", format="open_clip")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert type(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")).__name__ == "SimpleTokenizer"
    assert pretrained.load(tmp_path / "out").weights_hash == model.weights_hash


def test_what_the_library_reads_otherwise_is_not_kept(vit, tmp_path, monkeypatch):
    write = open_clip_format.Format.write

    def torn(self, model, folder):
        write(self, model, folder)
        path = folder / "open_clip_model.safetensors"
        state = load_file(path)
        state["ln_final.bias"] = state["ln_final.bias"] + 1e-3
        save_file(state, path)

    monkeypatch.setattr(open_clip_format.Format, "write", torn)
    with pytest.raises(ExportError, match="text_features differ by"):
        export.export(vit, tmp_path / "out", format="open_clip")
    assert not list(tmp_path.iterdir())


def test_a_wrong_vocabulary_or_processor_is_noticed(folders, vit):
    reader = registry.find("pretrain.exports", "open_clip").Format().read(folders["vit", "open_clip"])
    pairs = verification.drawn()
    verification.verify(vit, reader, pairs)
    tokens, pixels = reader.tokens, reader.pixels
    reader.tokens = lambda texts: [[row[0], row[1] + 1, *row[2:]] for row in tokens(texts)]
    with pytest.raises(ExportError, match=r"token ids of 'a photo of a cat' are"):
        verification.verify(vit, reader, pairs)
    reader.tokens, reader.pixels = tokens, lambda images: pixels(images).flip(1)
    with pytest.raises(ExportError, match="have cosine"):
        verification.verify(vit, reader, pairs)


def test_only_an_earlier_export_is_replaced(folders, vit, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is no export of ours"):
        export.export(vit, out, format="diptych")
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / export.MARK).write_text("{}")
    export.export(vit, out, format="diptych")
    assert not (out / "thesis.txt").exists() and json.loads((out / export.MARK).read_text())["format"] == "diptych"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_command_line(folders, tmp_path, capsys):
    shard = synthetic.write(tmp_path / "data", shards=1, samples=6)[0]
    source = str(folders["conv", "diptych"])
    out = tmp_path / "out"
    assert export.main([source, str(out), "--format", "open_clip", "--pairs", str(shard)]) == 0
    assert "verified" in capsys.readouterr().out
    assert json.loads((out / export.MARK).read_text())["verified"]["captions"] == 6
    for words, code, message in (
        ([source, str(tmp_path / "other"), "--format", "hf"], 2, "CLIPModel holds only"),
        ([str(tmp_path), str(tmp_path / "other"), "--format", "hf"], 2, "not a folder of a model that we know"),
        (
            [source, str(tmp_path / "other"), "--format", "diptych", "--pairs", "none.tar"],
            2,
            "shard none.tar: cannot be read (No such file or directory)",
        ),
        ([source, str(tmp_path / "other"), "--format", "diptych", "--step", "3"], 2, "is not a run folder"),
        ([source, str(shard / "other"), "--format", "diptych"], 1, "nothing was kept"),
    ):
        with pytest.raises(SystemExit) as stop:
            export.main(words)
        assert stop.value.code == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


WRITERS = {
    "vlt5": lambda: tiny_vlt5.section("t5", "patch", text={"vocab_size": None, "source_length": 60}),
    "ofa": test_ofa.section,
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_model_that_writes(name, tmp_path):
    section = WRITERS[name]()
    model = tiny.pretrained_model(section)
    out = tmp_path / name
    found = export.export(model, out, format="diptych")
    assert found["logits"] <= 1e-5 and found["captions"] == len(verification.drawn().captions)
    assert pretrained.load(out).weights_hash == model.weights_hash
    snippet = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) < 0
    with pytest.raises(ConfigError, match="--format diptych"):
        export.export(model, tmp_path / "other", format="hf")

    reader = registry.find("pretrain.exports", "diptych").Format().read(out)
    logits = reader.logits
    reader.logits = lambda batch: logits(batch) * 1.001
    with pytest.raises(ExportError, match="logits differ"):
        verification.verify(model, reader, verification.drawn())
    batch = reader.batch
    reader.batch = lambda pictures, texts: batch(pictures[::-1], texts)
    with pytest.raises(ExportError, match="image_NCHW of the same pictures"):
        verification.verify(model, reader, verification.drawn())
