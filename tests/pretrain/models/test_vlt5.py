"""VL-T5 and VL-BART: counts, identities of the joint encoder, one word table, decoding, ZeRO stages."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.engine import optim
from pretrain.engine.precision import Autocast
from pretrain.models import base, blocks, vlt5
from pretrain.models.cache import Cache
from tests.pretrain.engine.test_zero import engine
from tests.pretrain.models import tiny_vlt5

BACKBONES = pytest.mark.parametrize("backbone", ["t5", "bart"])
SOURCES = pytest.mark.parametrize(("source", "size"), [("region", 0), ("grid", 64), ("patch", 32)])


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.check("vl-t5", 1)
def test_published_counts() -> None:
    bart = {"backbone": "bart", "layers": 6}
    both = {"text": bart, "vision": {"norm": "each"}}
    for tree, words, total, text, seen in (
        ({}, 32200, 224_540_160, 222_958_848, 1_581_312),
        ({}, 32128, 222_903_552 + 1_581_312, 222_903_552, 1_581_312),
        ({"text": bart}, 50465, 141_155_328, 139_574_016, 1_581_312),
        (both, 50265, 139_420_416 + 1_582_848, 139_420_416, 1_582_848),
    ):
        with torch.device("meta"):
            made = vlt5.VLT5.build(vlt5.Config(**tree), base.Vocabulary(words, end=2, pad=1, start=0))
        assert (count(made), count(made.text), count(made.visual_embedding)) == (total, text, seen)


def test_sentinels_are_the_last_ids() -> None:
    names = tiny_vlt5.section().symbols
    assert len(names) == 200 == len(set(names)) and names[-1] == "<vis_extra_id_0>" and names[99] == "<extra_id_0>"
    assert tiny_vlt5.section("bart").symbols == ("<mask>", *names)
    assert names.index("<vis_extra_id_7>") == len(names) - 1 - 7 and names.index("<extra_id_7>") == 99 - 7


def double(backbone: str) -> vlt5.VLT5:
    return tiny_vlt5.model(tiny_vlt5.section(backbone)).double()


def seen(made: vlt5.VLT5, *, rows: int = 3, regions: int = 4) -> list[Tensor]:
    """Return features, boxes, picture and region numbers of some visual tokens."""
    feature_BRC = torch.randn(rows, regions, tiny_vlt5.FEATURE, dtype=torch.double)
    image_BR = torch.arange(regions).remainder(2).expand(rows, regions)
    region_BR = torch.arange(regions).expand(rows, regions)
    return [feature_BRC, torch.rand(rows, regions, 4, dtype=torch.double), image_BR, region_BR]


def states(made: vlt5.VLT5, parts: list[Tensor], valid_BR: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the text's states and all logits."""
    batch = tiny_vlt5.batch(3)
    feature_BRC, box_BR4, image_BR, region_BR = parts
    visual_BRC = made.visual_embedding(feature_BRC, box_BR4, image_BR, made.text.shared(made.last - region_BR))
    valid_BR = torch.ones_like(region_BR, dtype=torch.bool) if valid_BR is None else valid_BR
    memory = made.text.encode(batch.tokens_BT, batch.valid_BT, visual_BRC, valid_BR)
    return memory.states_BSC[:, :7], made.write(batch.decoder_tokens_BU, memory)


@pytest.mark.check("vl-t5", 3)
@BACKBONES
@torch.no_grad()
def test_the_order_of_regions_does_not_matter_where_their_numbers_go_along(backbone: str) -> None:
    made = double(backbone)
    parts = seen(made)
    text_BLC, logits_BUV = states(made, parts)
    moved_BLC, moved_BUV = states(made, [part[:, [2, 0, 3, 1]] for part in parts])
    assert torch.allclose(moved_BLC, text_BLC, atol=1e-12) and torch.allclose(moved_BUV, logits_BUV, atol=1e-12)
    for left in range(4):  # each of the four parts says something
        others = [part[:, [2, 0, 3, 1]] if number != left else part for number, part in enumerate(parts)]
        assert (states(made, others)[1] - logits_BUV).abs().max() > 1e-4


@pytest.mark.check("vl-t5", 4)
@BACKBONES
@torch.no_grad()
def test_to_mask_a_region_is_to_delete_it(backbone: str) -> None:
    made = double(backbone)
    parts = seen(made)
    valid_BR = torch.tensor([True, False, True, False]).expand(3, 4)
    for masked, deleted in zip(states(made, parts, valid_BR), states(made, [part[:, ::2] for part in parts])):
        assert torch.allclose(masked, deleted, atol=1e-12)


@BACKBONES
@torch.no_grad()
def test_padding_changes_nothing(backbone: str) -> None:
    """Whatever stands there: text of a source, text of a decoder, regions of other rows."""
    made, batch = double(backbone), tiny_vlt5.batch()
    logits_BUV = made(batch).logits_BUV
    for row, alone in enumerate(batch.split(1)):
        length, written = int(alone.valid_BT.sum()), int((alone.decoder_labels_BU >= 0).sum())
        cut = {"tokens_BT": alone.tokens_BT[:, :length], "valid_BT": alone.valid_BT[:, :length],
               "decoder_tokens_BU": alone.decoder_tokens_BU[:, :written]}  # fmt: skip
        found_BUV = made(dataclasses.replace(alone, **cut)).logits_BUV
        assert torch.allclose(found_BUV[0], logits_BUV[row, :written], atol=1e-12)
    noise_BT = torch.randint(3, 200, batch.tokens_BT.shape)
    noisy = dataclasses.replace(batch, tokens_BT=torch.where(batch.valid_BT, batch.tokens_BT, noise_BT))
    assert torch.allclose(made(noisy).logits_BUV, logits_BUV, atol=1e-12)


@BACKBONES
@SOURCES
@torch.no_grad()
def test_cached_steps_are_one_pass(backbone: str, source: str, size: int) -> None:
    made = tiny_vlt5.model(tiny_vlt5.section(backbone, source)).double()
    batch = tiny_vlt5.batch(size=size)
    batch = dataclasses.replace(batch, image_NCHW=batch.image_NCHW.double() if size else None)
    memory, tokens_BU = made.remember(batch), batch.decoder_tokens_BU
    whole_BUV = made.write(tokens_BU, memory)
    assert torch.equal(whole_BUV, made(batch).logits_BUV)
    cache, found = Cache(), []
    for part in tokens_BU.split([2, 1, 2], 1):
        found.append(made.write(part, memory, cache))
    assert cache.length == 5 and torch.allclose(torch.cat(found, 1), whole_BUV, atol=1e-12)
    rows = torch.tensor([3, 0, 0])
    cache.select(rows)
    cache.drop(1)
    again_BUV = made.write(tokens_BU[rows, 4:], memory.rows(rows), cache)
    assert torch.allclose(again_BUV, whole_BUV[rows, 4:], atol=1e-12)


@torch.no_grad()
def test_a_row_without_a_picture_is_text_alone() -> None:
    made = tiny_vlt5.model(tiny_vlt5.section("t5", "patch"))
    batch = tiny_vlt5.batch(size=32)  # the third row has none
    text = made.text.encode(batch.tokens_BT, batch.valid_BT)
    alone_BUV = made.write(batch.decoder_tokens_BU, text)
    logits_BUV = made(batch).logits_BUV
    assert torch.allclose(logits_BUV[2], alone_BUV[2], atol=1e-5)
    assert (logits_BUV[0] - alone_BUV[0]).abs().max() > 1e-3
    none = dataclasses.replace(batch, image_NCHW=None, owner_N=None)
    assert torch.allclose(made(none).logits_BUV, alone_BUV, atol=1e-5)


@BACKBONES
def test_what_a_decoder_opens_with(backbone: str) -> None:
    made = tiny_vlt5.model(tiny_vlt5.section(backbone))
    assert made.first == ((0,) if backbone == "t5" else (1, 2)) and made.end == 1
    if backbone == "bart":
        with pytest.raises(ConfigError, match="has no start token"):
            vlt5.VLT5.build(tiny_vlt5.section(backbone), tiny_vlt5.WORDS._replace(start=None))
    with pytest.raises(ConfigError, match="sentinels included"):
        vlt5.VLT5.build(tiny_vlt5.section(backbone), tiny_vlt5.WORDS._replace(size=301))


class Tables(TorchFunctionMode):
    """Where the matrices with a row for each word lie that lookups and products read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.functional.embedding, nn.functional.linear):
            weight = args[1]
            if weight.shape[0] == tiny_vlt5.VOCABULARY:
                self.found.append((func.__name__, weight.data_ptr()))
        return func(*args, **(kwargs or {}))


@pytest.mark.check("vl-t5", 7)
@BACKBONES
def test_words_regions_and_head_are_one_matrix(backbone: str) -> None:
    made = tiny_vlt5.model(tiny_vlt5.section(backbone))
    with Tables() as tables:
        made(tiny_vlt5.batch()).logits_BUV.sum().backward()
    where = made.text.shared.weight.data_ptr()
    assert tables.found == [*[("embedding", where)] * 3, ("linear", where)], "regions, source, decoder; the head"
    assert [tuple(p.shape) for p in made.parameters() if len(p) == tiny_vlt5.VOCABULARY] == [(300, 16)]
    assert made.last - 2 == tiny_vlt5.VOCABULARY - 1 - 2 and made.text.shared.weight.grad[made.last - 2].any()


@BACKBONES
def test_recomputed_blocks_change_nothing(backbone: str) -> None:
    losses = []
    for every in (False, True, 2):
        text = {"checkpointing": every, "layers": 3}
        made = tiny_vlt5.model(tiny_vlt5.section(backbone, text=text)).train()
        assert blocks.any_recomputed(made) == bool(every)
        loss, _ = tiny_vlt5.mixture(made)([tiny_vlt5.batch()])
        loss.backward()
        losses.append((loss.item(), made.text.shared.weight.grad.norm().item()))
    assert losses[1] == pytest.approx(losses[0]) and losses[2] == pytest.approx(losses[0])


@pytest.mark.filterwarnings("error:Mismatch dtype")
@BACKBONES
def test_half_precision_is_near(backbone: str) -> None:
    """And norms take the fused kernel: none gets half precision beside a gain in single."""
    mixture, batch = tiny_vlt5.mixture(tiny_vlt5.model(tiny_vlt5.section(backbone)).train()), tiny_vlt5.batch()
    loss, near = (Autocast(mixture, kind, device_type="cpu")([batch])[0] for kind in ("fp32", "bf16"))
    near.backward()
    assert near.item() == pytest.approx(loss.item(), rel=5e-3) and near.item() != loss.item()


def test_norms_and_biases_do_not_decay() -> None:
    """The released name filter misses every norm; ours goes by shape."""
    for backbone in ("t5", "bart"):
        made = tiny_vlt5.model(tiny_vlt5.section(backbone))
        gains = {id(p) for m in made.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm) for p in m.parameters()}
        gains |= {id(p) for name, p in made.named_parameters() if name.endswith("bias")}
        for group in optim.groups(made, optim.Config(weight_decay=0.01)):
            assert all((id(p) in gains) == (not group["weight_decay"]) for p in group["params"])


@BACKBONES
def test_depths(backbone: str) -> None:
    made = tiny_vlt5.model(tiny_vlt5.section(backbone, "patch"))
    found = made.depths()
    assert found.keys() == dict(made.named_parameters()).keys()
    layers = {name: where.layer for name, where in found.items() if where.tower == "text"}
    assert layers["text.shared.weight"] == 0 == layers["visual_embedding.feat_embedding.0.weight"]
    stack = "layers" if backbone == "bart" else "block"
    assert {layers[n] for n in layers if n.startswith(f"text.encoder.{stack}.1.")} == {2}
    assert {layers[n] for n in layers if n.startswith(f"text.decoder.{stack}.1.")} == {4}
    assert {where.last for where in found.values() if where.tower == "text"} == {4}


@BACKBONES
def test_it_learns_what_only_the_regions_tell(backbone: str) -> None:
    """Equal sources, different regions: what each row says, a sentinel among it, is written exactly."""
    made = tiny_vlt5.model(tiny_vlt5.section(backbone), shaken=False).train()
    batch = tiny_vlt5.batch(8, regions=(3, 2, 3, 1))
    said_BU = torch.cat([batch.decoder_tokens_BU[:, 1:4], torch.ones(8, 1, dtype=torch.long)], 1)
    said_BU[:, 1] = made.last - torch.arange(8) % 3
    first_BU = torch.tensor([made.first] * 8)
    labels_BU = torch.cat([first_BU[:, 1:], said_BU], 1)
    batch = dataclasses.replace(
        batch,
        tokens_BT=batch.tokens_BT[:1].expand(8, 7),
        valid_BT=batch.valid_BT[:1].expand(8, 7),
        decoder_tokens_BU=torch.cat([first_BU, said_BU[:, :-1]], 1),
        decoder_labels_BU=labels_BU,
    )
    mixture = tiny_vlt5.mixture(made)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(150):
        loss, _ = mixture([batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert torch.equal(greedy(made.eval(), batch)[:, :4], said_BU)


# --- under DeepSpeed -------------------------------------------------------------------------------------------------


def rows(step: int, source: str) -> Batch:
    """Return this rank's rows of a step."""
    whole = tiny_vlt5.batch(8, seed=step, size=32 if source == "patch" else 0)
    return whole.split(8 // dist.world())[dist.rank()]


def greedy(made: vlt5.VLT5, batch: Batch) -> Tensor:
    """Return five tokens a row, written one by one."""
    memory, cache = made.remember(batch), Cache()
    last_BU = torch.tensor([made.first] * len(batch))
    out = []
    for _ in range(5):
        last_BU = made.write(last_BU, memory, cache)[:, -1:].argmax(-1)
        out.append(last_BU)
    return torch.cat(out, 1)


def trained(stage: int, backbone: str, source: str) -> tuple[list[float], Tensor]:
    """Run on every rank: four steps, then five written tokens of each row; there is one word table all along."""
    module = tiny_vlt5.mixture(tiny_vlt5.model(tiny_vlt5.section(backbone, source), shaken=False))
    made = engine(stage, module=module)
    try:
        losses = []
        for step in range(4):
            loss, _ = made([rows(step % 2, source)])
            made.backward(loss)
            made.step(0.02)
            losses.append(dist.mean(loss).item())
        with made.evaluating(), Tables() as tables:
            said_BU = module([rows(9, source)], want=greedy)
        shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters()]
        assert [shape for shape in shapes if shape[0] == tiny_vlt5.VOCABULARY] == [(300, 16)]
        if stage < 3:  # stage 3 gathers it anew each time, and has a product of its own
            where = module.model.text.shared.weight.data_ptr()
            assert set(tables.found) == {("embedding", where), ("linear", where)}
        return losses, dist.gather(said_BU)
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.check("vl-t5", 7)
@pytest.mark.parametrize(("backbone", "source"), [("t5", "region"), ("bart", "region"), ("t5", "patch")])
def test_stages_and_worlds_agree(ranks, backbone: str, source: str) -> None:
    losses, said_BU = ranks.run(1, trained, 0, backbone, source)[0]
    assert losses[2] < losses[0] and losses[3] < losses[1]
    for stage in range(4):
        for found, written_BU in ranks.run(2, trained, stage, backbone, source):
            assert found == pytest.approx(losses, rel=1e-5) and torch.equal(written_BU, said_BU)
