"""A folder of another library as `base`: the zero-shot number that stands beside a run is that library's own."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from finetune import main
from pretrain import config, export
from pretrain.evals.zero_shot import class_weights
from pretrain.metrics.classification import top_k
from tests import tiny
from tests.finetune.test_main import recipe_file

COLOURS = ("red", "blue", "green", "black", "white", "grey")
SENTENCES = ["a photo of a {}.", "two of {}, small"]


def pictures(folder: Path) -> Path:
    """Write pictures of blurred noise that are no squares of the tower's size."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 11)):
        for number in range(6 * count):
            path = folder / split / f"{COLOURS[number % 6]}_thing" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((90, 60)).save(path)
    return folder


def spread(model: torch.nn.Module) -> None:
    """Give weights at which features differ from picture to picture."""
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.add_(0.3 * torch.randn_like(p))


def of_open_clip(folder: Path) -> tuple[object, object, object]:
    """Write a folder as its users have it; return its model, and how it reads pictures and texts."""
    cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    theirs = open_clip.CLIP(**cfg)
    spread(theirs)
    folder.mkdir()
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    look = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": look}))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


def of_transformers(folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """Write a folder with random weights of transformers' own class, and return what it loads."""
    export.export(tiny.pretrained_model(tiny.vit_section()), folder, format="hf")  # for its tokenizer and processor
    made = CLIPModel(CLIPConfig.from_pretrained(folder))
    spread(made)
    made.save_pretrained(folder)
    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder, backend="pil")


def job(folder: Path, base: Path, data: Path) -> main.Job:
    file = recipe_file(folder, method="{name: linear_probe, c: 1.0}")
    words = [f"base={base}", f"task.data={data}", "task.shots=1", f"task.templates={json.dumps(SENTENCES)}"]
    return main.Job(config.load(main.Recipe, file, words), torch.device("cpu"))


@torch.no_grad()
def compare(made: main.Job, logits_NK: torch.Tensor, target_N: torch.Tensor) -> None:
    """Compare the run's zero-shot score, and the cosines behind it, with another library's of the same pictures."""
    run = lambda batch, want: getattr(made.base.model(batch), want)  # noqa: E731
    weight_KE = class_weights(made._features(run), made.splits.names, SENTENCES, batch_size=7)
    batches = list(made.read("test"))
    seen = torch.cat([batch.image_NE @ weight_KE.T for batch in batches])[: len(target_N)]
    got_N = torch.cat([batch.target_B for batch in batches])[: len(target_N)]
    assert torch.equal(got_N, target_N)
    torch.testing.assert_close(seen, logits_NK, rtol=0, atol=2e-6)
    want = top_k(logits_NK, target_N, 1)
    assert made.zero_shot() == {"few_shot/zero_shot": want} and want.count == 66
    assert logits_NK.argmax(1).unique().numel() > 1, "the comparison would see nothing"


def found(data: Path, names: list[str]) -> tuple[list[Image.Image], torch.Tensor]:
    files = sorted((data / "test").glob("*/*"), key=lambda p: p.relative_to(data / "test").as_posix())
    images = [Image.open(path).convert("RGB") for path in files]
    return images, torch.tensor([names.index(path.parent.name.replace("_", " ")) for path in files])


@pytest.mark.check("zero-shot", 5)
@torch.no_grad()
def test_open_clips_own_number(tmp_path):
    theirs, preprocess, words = of_open_clip(tmp_path / "base")
    data = pictures(tmp_path / "mine")
    made = job(tmp_path, tmp_path / "base", data)
    images, target_N = found(data, made.splits.names)
    templates = [lambda name, line=line: line.replace("{}", name) for line in SENTENCES]
    weight_EK = open_clip.build_zero_shot_classifier(
        theirs, words, made.splits.names, templates, num_classes_per_batch=4, device="cpu"
    )
    image_NE = theirs.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
    compare(made, image_NE @ weight_EK, target_N)


@pytest.mark.check("zero-shot", 5)
@torch.no_grad()
def test_transformers_own_number(tmp_path):
    theirs, processor = of_transformers(tmp_path / "base")
    data = pictures(tmp_path / "mine")
    made = job(tmp_path, tmp_path / "base", data)
    images, target_N = found(data, made.splits.names)
    lines = [line.replace("{}", name) for name in made.splits.names for line in SENTENCES]
    out = theirs(**processor(text=lines, images=images, return_tensors="pt", padding=True, truncation=True))
    text_KtE = out.text_embeds.unflatten(0, (len(made.splits.names), -1))
    weight_KE = torch.nn.functional.normalize(text_KtE.mean(1), dim=-1)
    compare(made, out.image_embeds @ weight_KE.T, target_N)


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(name, tmp_path):
    of_open_clip(tmp_path / "base")
    (tmp_path / "base" / name).unlink()
    with pytest.raises(config.ConfigError, match="model "):
        job(tmp_path, tmp_path / "base", pictures(tmp_path / "mine"))
