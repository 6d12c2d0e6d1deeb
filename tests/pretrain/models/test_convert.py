"""Every layout is compared with the library that owns it, on random weights."""

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.models import clip_shape, convert_open_clip, convert_transformers, text, vision, vlm

END = 60  # not the largest id, so that pooling at the largest id would be noticed
TOLERANCE = 1e-5


def section(*, activation="gelu", quick=False, name=None, args=None, **more) -> vlm.Config:
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "mlp_ratio": 2.0}
    name = name or f"vit_base_patch32_clip_{'quickgelu_' if quick else ''}224"
    return vlm.Config(
        vision=vision.Config(name=name, image_size=32, args=small if args is None else args),
        text=text.Config(context_length=12, vocab_size=64, width=40, layers=2, heads=2, activation=activation),
        embed_dim=24,
        **more,
    )


def ours(config: vlm.Config, *, end: int = END) -> vlm.VLM:
    torch.manual_seed(0)
    model = vlm.VLM(config, end=end, pad=0).eval()
    for parameter in model.parameters():  # norms and biases away from one and zero, or a swap would go unseen
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def inputs(config: vlm.Config, *, end: int = END):
    generator = torch.Generator().manual_seed(1)
    size, length = config.vision.image_size, config.text.context_length
    image_NCHW = torch.randn(3, 3, size, size, generator=generator)
    tokens_BT = torch.randint(0, config.text.vocab_size, (3, length), generator=generator)
    tokens_BT[tokens_BT == end] = 1
    for row, at in enumerate((length - 1, 4, 7)):
        tokens_BT[row, at] = end
    return image_NCHW, tokens_BT


@torch.no_grad()
def features(model: vlm.VLM, image_NCHW, tokens_BT):
    encodings = model(Batch(keys=["a"] * len(tokens_BT), image_NCHW=image_NCHW, tokens_BT=tokens_BT))
    return encodings.image, encodings.text


@torch.no_grad()
def compare_open_clip(model: vlm.VLM, theirs, *, end: int = END) -> None:
    image_NCHW, tokens_BT = inputs(model.config, end=end)
    image_NE, text_BE = features(model, image_NCHW, tokens_BT)
    assert (image_NE - theirs.encode_image(image_NCHW, normalize=True)).abs().max() <= TOLERANCE
    assert (text_BE - theirs.encode_text(tokens_BT, normalize=True)).abs().max() <= TOLERANCE
    assert torch.allclose(model.scale, theirs.logit_scale.exp())


@torch.no_grad()
def compare_transformers(model: vlm.VLM, theirs: CLIPModel) -> None:
    image_NCHW, tokens_BT = inputs(model.config)
    image_NE, text_BE = features(model, image_NCHW, tokens_BT)
    out = theirs(input_ids=tokens_BT, pixel_values=image_NCHW)
    assert (image_NE - out.image_embeds).abs().max() <= TOLERANCE
    assert (text_BE - out.text_embeds).abs().max() <= TOLERANCE
    logits_NB = model.scale * image_NE @ text_BE.T
    assert (logits_NB - out.logits_per_image).abs().max() <= TOLERANCE * model.scale


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].shape == b[name].shape for name in a)


def to_open_clip(model: vlm.VLM):
    theirs = open_clip.CLIP(**convert_open_clip.config_to(model.config, end=END)).eval()
    theirs.load_state_dict(convert_open_clip.weights_to(model.config, model.state_dict()))
    return theirs


SECTIONS = {
    "vit gelu": section(),
    "vit quick gelu": section(activation="quick_gelu", quick=True),
    "vit sigmoid": section(logit_scale=2.3, logit_bias=-10.0),
    "conv": section(name="convnext_atto", args={}),
    "conv drop path": section(name="test_convnext", args={"drop_path_rate": 0.1}),
    "batch norm": section(name="test_byobnet", args={}),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_open_clip_out_and_in(name):
    config = SECTIONS[name]
    model = ours(config)
    theirs = to_open_clip(model)
    assert theirs.logit_scale.ndim == 0
    compare_open_clip(model, theirs)
    tree = convert_open_clip.config_to(config, end=END)
    again = convert_open_clip.config_from(tree, {}, tokenizer="clip")
    weights = convert_open_clip.weights_from(again, theirs.state_dict())
    assert equal(weights, model.state_dict())
    back = ours(again)
    back.load_state_dict(weights)
    compare_open_clip(back, theirs)


@pytest.mark.parametrize("mixed", [section(quick=True), section(activation="quick_gelu")])
def test_towers_of_two_activations(mixed):
    """open_clip has one flag for both of its towers, so timm builds the pictures' one; CLIPModel has two flags."""
    assert convert_open_clip.config_to(mixed, end=END)["vision_cfg"]["timm_model_name"].startswith("local-dir:")
    model = ours(mixed)
    theirs = CLIPModel(CLIPConfig(**convert_transformers.config_to(mixed, start=0, end=END, pad=END))).eval()
    theirs.load_state_dict(convert_transformers.weights_to(mixed, model.state_dict()))
    compare_transformers(model, theirs)


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_in(custom, quick):
    """Their own init, both model classes, wrapped as their trainer saves it."""
    torch.manual_seed(0)
    cfg = {
        "embed_dim": 32,
        "quick_gelu": quick,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "patch_size": 16,
            "mlp_ratio": 2.3,
        },
        "text_cfg": {"context_length": 12, "vocab_size": 64, "width": 64, "heads": 4, "layers": 2, "mlp_ratio": 2.3},
    }
    theirs = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cfg).eval()
    config = convert_open_clip.config_from(cfg, {"mean": 0.5, "std": [0.5, 0.5, 0.4]}, tokenizer="clip")
    assert config.vision.mean == (0.5, 0.5, 0.5) and config.vision.std == (0.5, 0.5, 0.4)
    state = {f"module._orig_mod.{name}": tensor for name, tensor in theirs.state_dict().items()}
    model = vlm.VLM(config, end=63, pad=0).eval()
    model.load_state_dict(convert_open_clip.weights_from(config, state))
    compare_open_clip(model, theirs, end=63)


def test_vit_b_32():
    """The full size once: equal count, names and features; the shape is also read off the bare weights."""
    theirs = open_clip.create_model("ViT-B-32").eval()
    state = theirs.state_dict()
    cfg = convert_open_clip.infer(state, quick_gelu=False)
    assert cfg["embed_dim"] == 512
    known = open_clip.get_model_config("ViT-B-32")
    assert all(cfg["vision_cfg"][key] == value for key, value in known["vision_cfg"].items())
    assert all(cfg["text_cfg"][key] == value for key, value in known["text_cfg"].items())
    config = convert_open_clip.config_from(cfg, tokenizer="clip")
    assert config.vision == vision.Config() and config == vlm.Config(text=text.Config(vocab_size=49408))
    model = vlm.VLM(config, end=49407, pad=0).eval()
    model.load_state_dict(convert_open_clip.weights_from(config, state))
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 151_277_313
    compare_open_clip(model, theirs, end=49407)
    assert equal(convert_open_clip.weights_to(config, model.state_dict()), state)


def test_quickgelu_of_the_named_models():
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14"):
        for suffix, word in (("", "clip_224"), ("-quickgelu", "clip_quickgelu_224")):
            config = convert_open_clip.config_from(open_clip.get_model_config(name + suffix), tokenizer="clip")
            assert config.vision.name.endswith(word) and not config.vision.args
            shape = clip_shape.of(config.vision)
            assert shape.activation == config.text.activation == ("quick_gelu" if suffix else "gelu")
            assert shape.heads == {"B": 12, "L": 16, "H": 16}[name[4]]


@pytest.mark.parametrize("name", ["vit gelu", "vit quick gelu"])
def test_transformers_out_and_in(name):
    config = SECTIONS[name]
    model = ours(config)
    tree = convert_transformers.config_to(config, start=59, end=END, pad=END)
    theirs = CLIPModel(CLIPConfig(**tree)).eval()
    theirs.load_state_dict(convert_transformers.weights_to(config, model.state_dict()))
    compare_transformers(model, theirs)
    again = convert_transformers.config_from(theirs.config.to_dict(), tokenizer="clip")
    weights = convert_transformers.weights_from(again, theirs.state_dict())
    assert equal(weights, model.state_dict())
    back = ours(again)
    back.load_state_dict(weights)
    compare_transformers(back, theirs)


def test_the_wrong_activation_shows():
    model = ours(SECTIONS["vit gelu"])
    other = vlm.VLM(SECTIONS["vit quick gelu"], end=END, pad=0).eval()
    other.load_state_dict(model.state_dict())
    scale, (image_NCHW, tokens_BT) = model.scale, inputs(model.config)
    a, b = (scale * x @ y.T for x, y in (features(m, image_NCHW, tokens_BT) for m in (model, other)))
    assert (a - b).abs().max() > 1e-3


def test_the_clamp_of_our_forward_is_exported():
    model = ours(SECTIONS["vit gelu"])
    model.logit_scale.data.fill_(9.0)
    compare_open_clip(model, to_open_clip(model))


def test_towers_that_differ_from_timms_name_are_marked():
    for name, args in (("convnext_atto", {"depths": [1, 1, 1, 1]}), ("vit_tiny_patch16_224", {})):
        config = section(name=name, args=args)
        cfg = convert_open_clip.config_to(config, end=END)["vision_cfg"]
        assert cfg["timm_model_name"] == f"local-dir:{name}"
        assert convert_open_clip.trunk_config(config.vision)["architecture"] == name


def test_what_cannot_be_held_is_refused():
    conv = section(name="convnext_atto", args={})
    with pytest.raises(ConfigError, match=r"CLIPModel holds only CLIP's own ViT.*ConvNeXt.*--format open_clip"):
        convert_transformers.config_to(conv, start=0, end=END, pad=END)
    with pytest.raises(ConfigError, match="logit_bias"):
        convert_transformers.config_to(SECTIONS["vit sigmoid"], start=0, end=END, pad=END)
    with pytest.raises(ConfigError, match="end token 2"):
        convert_transformers.config_to(SECTIONS["vit gelu"], start=0, end=2, pad=END)
    bert = section()
    bert.text = text.Config(name="hf:folder")
    for refuse in (
        lambda: convert_open_clip.config_to(bert, end=END),
        lambda: convert_transformers.config_to(bert, start=0, end=END, pad=END),
    ):
        with pytest.raises(ConfigError, match=r"hf:folder.*--format diptych"):
            refuse()


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "roberta-ViT-B-32", "EVA02-B-16"])
def test_foreign_models_are_refused(name):
    cfg = open_clip.get_model_config(name)
    with pytest.raises(ConfigError, match=r"open_clip config|not supported"):
        config = convert_open_clip.config_from(cfg, {}, tokenizer="clip")
        pytest.fail(f"{config} was accepted")


def test_left_over_and_missing_weights_are_refused():
    config = SECTIONS["vit gelu"]
    state = convert_open_clip.weights_to(config, ours(config).state_dict())
    with pytest.raises(ConfigError, match=r"no place for visual\.extra"):
        convert_open_clip.weights_from(config, state | {"visual.extra": torch.ones(1)})
    state.pop("ln_final.weight")
    with pytest.raises(ConfigError, match=r"'ln_final\.weight' is missing"):
        convert_open_clip.weights_from(config, state)
    with pytest.raises(ConfigError, match=r"'visual\.proj' is missing"):
        convert_open_clip.infer({"visual.conv1.weight": torch.ones(1)}, quick_gelu=False)
