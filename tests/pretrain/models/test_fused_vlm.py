"""Text that reads pictures: no leak under any mask, mixed rows are single rows, padding is nothing, writing is reading.

Everything in float64; `coca` is causal only.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.models import fused_vlm, fusion, vision, vlm
from pretrain.models.cache import Cache
from pretrain.models.candidates import log_likelihood
from pretrain.models.fusion import Stream
from pretrain.models.generate import generate
from pretrain.models.masks import Mode, stream_mask, text_blocks
from pretrain.models.sites import sites
from pretrain.models.writing import Options
from tests import tiny
from tests.pretrain.models import fused

ALL = (*fused.KINDS, "coca")
MODES = [(Mode.BI, 0), (Mode.CAUSAL, 0), (Mode.PREFIX, 3), (Mode.PREFIX, 6)]


def states(model, batch, blocks_BT: Tensor, **keys) -> Tensor:
    return model(batch).fuse(batch.tokens_BT, blocks_BT, valid_BT=batch.valid_BT, **keys)


def blocks(mode: Mode, prefix: int, rows: int, length: int) -> Tensor:
    return text_blocks(torch.full((rows,), int(mode)), length, torch.full((rows,), prefix))


def modes_of(kind: str) -> list[tuple[Mode, int]]:
    return MODES if kind != "coca" else [(Mode.CAUSAL, 0)]


@pytest.mark.check("univl", 1)
@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_a_changed_word_changes_no_state_that_must_not_know_it(kind: str) -> None:
    model, batch, length = fused.model(kind).eval(), fused.batch(3, length=9, shortest=9), 9
    for mode, prefix in modes_of(kind):
        mask_BT = blocks(mode, prefix, 3, length)
        before = states(model, batch, mask_BT)
        for word in range(1, length):
            tokens_BT = batch.tokens_BT.clone()
            tokens_BT[:, word] = (tokens_BT[:, word] + 1) % fused.START
            after = model(batch).fuse(tokens_BT, mask_BT, valid_BT=batch.valid_BT)
            changed_T = (after != before).any(-1).any(0)
            first = 0 if mode == Mode.BI or word < prefix else word
            assert changed_T.tolist() == [place >= first for place in range(length)], (mode, prefix, word)


@pytest.mark.check("univl", 9)
@pytest.mark.parametrize("kind", ALL)
def test_the_gradient_of_a_state_ends_where_its_mask_ends(kind: str) -> None:
    model, batch, length = fused.model(kind).eval(), fused.batch(2, length=8, shortest=8), 8
    seen = []
    model.text.token_embedding.register_forward_hook(lambda _, args, out: seen.append(out.retain_grad() or out))
    for mode, prefix in modes_of(kind):
        for place in range(length):
            seen.clear()
            states(model, batch, blocks(mode, prefix, 2, length))[:, place].square().sum().backward()
            reached_T = (seen[0].grad != 0).any(-1).any(0)
            last = length if mode == Mode.BI else max(prefix, place + 1)
            assert reached_T.tolist() == [word < last for word in range(length)], (mode, prefix, place)


@pytest.mark.check("univl", 3)
@torch.no_grad()
def test_pictures_know_nothing_of_text_unless_they_read_it() -> None:
    """Every layer's image states, of a joint stream under each mode."""
    layers = fused.model("joint").fusion
    draw = torch.Generator().manual_seed(0)
    image_BIC, text_BTC, other_BTC = (torch.randn(1, n, 16, dtype=torch.double, generator=draw) for n in (4, 5, 5))
    for mode in (Mode.BI, Mode.CAUSAL, Mode.PREFIX, Mode.FULL, Mode.PREFIX_FULL):
        mask_B1LL = stream_mask(torch.tensor([mode]), 4, 5, prefix_B=torch.tensor([2]))
        one, two = (layers.through(torch.cat([image_BIC, x], 1), mask_B1LL)[:, :4] for x in (text_BTC, other_BTC))
        assert torch.equal(one, two) == (mode not in (Mode.FULL, Mode.PREFIX_FULL)), mode


@pytest.mark.check("univl", 6)
@pytest.mark.parametrize("kind", fused.KINDS)
@torch.no_grad()
def test_rows_of_mixed_modes_are_each_as_if_alone(kind: str) -> None:
    model, batch = fused.model(kind).eval(), fused.batch(4)
    mode_B, prefix_B = torch.tensor([int(mode) for mode, _ in MODES]), torch.tensor([prefix for _, prefix in MODES])
    mixed = states(model, batch, text_blocks(mode_B, 9, prefix_B))
    for row, (mode, prefix) in enumerate(MODES):
        alone = states(model, batch, blocks(mode, prefix, 4, 9))
        torch.testing.assert_close(mixed[row], alone[row], rtol=0, atol=1e-14)
        one = batch.split(1)[row]
        torch.testing.assert_close(states(model, one, blocks(mode, prefix, 1, 9))[0], mixed[row], rtol=0, atol=1e-13)


@pytest.mark.check("univl", 7)
@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_padding_changes_nothing(kind: str) -> None:
    model, batch = fused.model(kind).eval(), fused.batch(4, length=9)
    rubbish_B2 = torch.tensor([[3, 4]]).expand(4, 2)
    wider = dataclasses.replace(
        batch,
        tokens_BT=torch.cat([batch.tokens_BT, rubbish_B2], 1),
        valid_BT=torch.cat([batch.valid_BT, torch.zeros(4, 2, dtype=torch.bool)], 1),
    )
    for mode, prefix in modes_of(kind):
        plain, padded = (states(model, b, blocks(mode, prefix, 4, b.tokens_BT.shape[1])) for b in (batch, wider))
        apart = (plain - padded[:, :9])[batch.valid_BT]
        assert apart.abs().max() < 1e-13, mode
    torch.testing.assert_close(model(wider).text, model(batch).text, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_rows_read_the_picture_that_they_are_told_to(kind: str) -> None:
    model, batch = fused.model(kind).eval(), fused.batch(3)
    mask_BT = torch.ones_like(batch.tokens_BT)
    own = states(model, batch, mask_BT)
    turned = states(model, batch, mask_BT, image_B=torch.tensor([1, 2, 0]))
    swapped = dataclasses.replace(batch, image_NCHW=batch.image_NCHW[[1, 2, 0]])
    torch.testing.assert_close(turned, states(model, swapped, mask_BT), rtol=0, atol=1e-13)
    assert (turned - own).abs().amax((1, 2)).min() > 1e-3
    by_text = states(model, batch, mask_BT, image_B=torch.tensor([0, 0, 1, 2]), text_B=torch.tensor([0, 1, 1, 2]))
    torch.testing.assert_close(by_text[[0, 2, 3]], own, rtol=0, atol=1e-13)
    two = states(model, batch, mask_BT, image_B=torch.tensor([[0, 1], [1, -1], [2, -1]]))
    torch.testing.assert_close(two[1:], own[1:], rtol=0, atol=1e-13)
    assert (two[0] - own[0]).abs().max() > 1e-3, "a row may read two pictures"


@pytest.mark.parametrize("kind", ALL)
def test_rows_without_a_picture_run_the_same_modules(kind: str) -> None:
    """Their text is as in a batch with pictures, and no gradient comes to the vision tower from them."""
    model, batch = fused.model(kind).eval(), fused.batch(3)
    some = dataclasses.replace(batch, image_NCHW=batch.image_NCHW[[0, 2]], owner_N=torch.tensor([0, 2]))
    none = dataclasses.replace(batch, image_NCHW=None, owner_N=None)
    mask_BT = torch.ones_like(batch.tokens_BT)
    model.zero_grad()
    blind = states(model, none, mask_BT)
    torch.testing.assert_close(states(model, some, mask_BT)[1], blind[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(states(model, some, mask_BT)[2], states(model, batch, mask_BT)[2], rtol=0, atol=1e-13)
    blind.sum().backward()
    grads = [p.grad for p in model.vision.trunk.parameters()]
    assert all(g is not None and not g.any() for g in grads if g is not None) and any(g is not None for g in grads)


@torch.no_grad()
def written(model, batch, tokens_BU: Tensor, *steps: int) -> Tensor:
    """Return logits of tokens, written in steps of so many with one cache."""
    memory, cache = model.remember(batch), Cache()
    return torch.cat([model.write(part, memory, cache) for part in tokens_BU.split(list(steps), 1)], 1)


def test_a_picture_that_is_not_there_is_in_no_statistics() -> None:
    """A tower with batch norms, on a rank whose batch is text alone: what evaluation uses stays as it was."""
    section = fused.section()
    section.vision = vision.Config(name="resnet18", image_size=32, args={"layers": [1, 1, 1, 1]})
    model = fused_vlm.FusedVLM.build(section, fused.WORDS).double().train()
    batch = dataclasses.replace(fused.batch(2), image_NCHW=None, owner_N=None)
    model(batch).fuse(batch.tokens_BT, batch.blocks_BT, valid_BT=batch.valid_BT).sum().backward()
    norm = model.vision.trunk.bn1
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any() and norm.training


@pytest.mark.check("univl", 4)
@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_writing_step_by_step_is_reading_at_once(kind: str) -> None:
    model, batch = fused.model(kind).eval(), fused.batch(4, length=9)
    expected = model.lm_logits(states(model, batch, torch.ones_like(batch.tokens_BT)))
    for steps in ([1] * 9, [4, 5], [9]):
        found = written(model, batch, batch.tokens_BT, *steps)
        assert (found - expected)[batch.valid_BT].abs().max() < 1e-12, steps


@pytest.mark.check("univl", 4)
@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_prompts_of_unequal_lengths_are_prefixes(kind: str) -> None:
    """`first` stands for the prompt: what it says is the word after it; each row is as if it were alone, unpadded."""
    model, batch = fused.model(kind).eval(), fused.batch(3, length=8, shortest=8)
    given_B = torch.tensor([1, 3, 5])
    batch.labels_BT = batch.labels_BT.masked_fill(torch.arange(8) < given_B[:, None], -100)
    new_B3 = torch.tensor([[5, 6, 7]]).expand(3, 3)
    tokens_BU = torch.cat([torch.full((3, 1), fused.START), new_B3], 1)
    found = written(model, batch, tokens_BU, 1, 1, 2)
    for row, given in enumerate(given_B.tolist()):
        one = batch.split(1)[row]
        tokens_BT = torch.cat([one.tokens_BT[:, :given], new_B3[:1]], 1)
        mode = Mode.CAUSAL if kind == "coca" else Mode.PREFIX
        alone = model(one).fuse(tokens_BT, blocks(mode, given, 1, given + 3))
        assert (found[row] - model.lm_logits(alone)[0, given - 1 :]).abs().max() < 1e-12


@torch.no_grad()
def test_rows_of_a_beam() -> None:
    model, batch = fused.model("joint").eval(), fused.batch(2, length=8, shortest=8)
    memory, cache = model.remember(batch), Cache()
    model.write(batch.tokens_BT[:, :3], memory, cache)
    order = torch.tensor([1, 1, 0])
    cache.select(order)
    found = model.write(batch.tokens_BT[order, 3:5], memory.rows(order), cache)
    expected = model.write(batch.tokens_BT[:, :5], memory)[order, 3:]
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.check("univl", 5)
@pytest.mark.parametrize("kind", fused.KINDS)
@torch.no_grad()
def test_writing_at_an_appended_mask_forgets_it(kind: str) -> None:
    """Against the text of each step with its mask, read at once; and keeping the mask would be wrong."""
    model, batch = fused.model(kind, predict="masked").eval(), fused.batch(2, length=7, shortest=7)
    tokens_BU = batch.tokens_BT[:, :5]
    expected = []
    for place in range(5):
        masked = torch.cat([tokens_BU[:, : place + 1], torch.full((2, 1), fused.MASK)], 1)
        expected.append(model.lm_logits(model(batch).fuse(masked, torch.ones_like(masked)))[:, -1])
    for steps in ([1] * 5, [5]):
        assert (written(model, batch, tokens_BU, *steps) - torch.stack(expected, 1)).abs().max() < 1e-12
    kept = Cache()
    kept.drop = lambda tokens: None  # type: ignore[method-assign]
    assert (model.write(tokens_BU[:, :2], model.remember(batch), kept)[:, 1] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("predict", ["next", "masked"])
def test_a_text_is_written_to_the_last_place_and_no_further(predict: str) -> None:
    """The last word needs no place, but where words are said at a mask, which takes one."""
    section, batch = fused.section(predict=predict), fused.batch(2)
    batch.labels_BT[:, 1:3] = -100  # three tokens are given
    room = section.text.context_length + section.beyond - 3
    model, options = fused.model(predict=predict).eval(), Options(min_tokens=99, max_tokens=99)
    wrote = generate(model, batch, options, room=[room] * 2)
    assert [len(kept[0].tokens) for kept in wrote] == [room] * 2
    assert [len(kept[0].tokens) for kept in generate(model, batch, options)] == [room] * 2, "it knows its places"
    with pytest.raises(ConfigError, match=r"do not fit behind what is given, where the model has places for"):
        generate(model, batch, options, room=[room, room + 1])


@pytest.mark.parametrize("predict", ["next", "masked"])
@pytest.mark.parametrize("kind", fused.KINDS)
@torch.no_grad()
def test_rows_with_little_room_do_not_hinder_others(kind: str, predict: str) -> None:
    """A long prompt leaves room for less: each row is written and scored as if it were alone."""
    model, batch = fused.model(kind, predict=predict).eval(), fused.batch(2, length=14, shortest=14)
    given_B = torch.tensor([12, 3])
    batch.labels_BT = batch.labels_BT.masked_fill(torch.arange(14) < given_B[:, None], -100)
    room_B = model.room(model.remember(batch))
    assert room_B.tolist() == [16 + model.config.beyond - given for given in (12, 3)]
    for options in (Options(max_tokens=99), Options(max_tokens=99, beams=3), Options(max_tokens=99, min_tokens=99)):
        for cached in (True, False):
            both = generate(model, batch, options, cached=cached)
            alone = [generate(model, one, options, cached=cached)[0] for one in batch.split(1)]
            assert [[h.tokens for h in row] for row in both] == [[h.tokens for h in row] for row in alone]
    texts = [[5] * (int(room) - 1) for room in room_B]
    found_B = log_likelihood(model, model.remember(batch), texts)
    for row, one in enumerate(batch.split(1)):
        expected_1 = log_likelihood(model, model.remember(one), texts[row : row + 1])
        assert (found_B[row] - expected_1).abs().max() < 1e-4
    with pytest.raises(ConfigError, match="do not fit behind what is given"):
        log_likelihood(model, model.remember(batch), [[*texts[0], 5], texts[1]])


@torch.no_grad()
def test_a_rank_that_waits_at_its_last_place_needs_no_further_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fused.model("joint").eval(), fused.batch(2)
    batch.labels_BT[:, 1:3] = -100  # three tokens are given
    expected = generate(model, batch, Options(max_tokens=99, min_tokens=99))
    calls = iter(range(30))  # other ranks have shorter prompts: they write for longer
    monkeypatch.setattr("pretrain.dist.any_rank", lambda mine, **_: next(calls) < 25 or mine)
    for cached in (True, False):
        calls = iter(range(30))
        assert generate(model, batch, Options(max_tokens=99, min_tokens=99), cached=cached) == expected


@pytest.mark.check("univl", 14)
@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_a_fresh_model_knows_nothing(kind: str) -> None:
    section = fused.section(kind)
    section.text.width, section.text.heads, section.text.vocab_size = 64, 4, 3000
    torch.manual_seed(0)
    cls = type(fused.model(kind))
    model, batch = cls.build(section, fused.WORDS).eval(), fused.single(fused.batch(4))
    logits = model.lm_logits(states(model, batch, torch.ones_like(batch.tokens_BT)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens_BT.flatten())
    assert loss.item() == pytest.approx(torch.tensor(3000.0).log().item(), rel=0.05)


def test_without_fusion_a_model_is_what_it_was() -> None:
    """No weight more, none renamed, the same towers; and with it, the towers' names and first weights stay."""
    plain, section = tiny.model(), tiny.vit_section()
    assert "fusion" not in section.architecture() and section.symbols == ()
    section.fusion = fusion.Config(layers=1)
    section.text.vocab_size = None
    words = fused.WORDS._replace(size=tiny.VOCABULARY, end=tiny.END, pad=tiny.END, mask=tiny.VOCABULARY - 3)
    torch.manual_seed(0)
    made = fused_vlm.FusedVLM.build(section, words)
    new = {n: x.shape for n, x in made.state_dict().items() if not n.startswith(("bridge.", "fusion.", "match."))}
    assert new == {n: x.shape for n, x in plain.state_dict().items()}
    assert section.architecture()["fusion"]["kind"] == "cross"


@pytest.mark.parametrize("kind", ALL)
def test_recomputed_layers_have_the_same_gradients(kind: str) -> None:
    batch, grads = fused.batch(3), []
    for checkpointing in (False, True):
        model = fused.model(kind, checkpointing=checkpointing)
        states(model, batch, batch.blocks_BT).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and "fusion.blocks.0.mlp.up.weight" in grads[0]
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_sites_of_the_fusion() -> None:
    found = sites(fused.model("cross"), tower="fusion", roles=("qkv", "cross_kv", "cross"))
    assert [(s.role, s.width) for s in found[:3]] == [("qkv", 48), ("cross_kv", 32), ("cross", 16)]


def test_depths_and_names() -> None:
    found = fused.model("cross").depths()
    assert {d.tower for d in found.values()} == {"vision", "text", "fusion"}
    assert found["fusion.blocks.2.cross.kv.weight"].layer == 3


def test_segments_tell_given_from_written() -> None:
    stream = Stream(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), None)
    assert stream.segments(4).tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert stream.segments(2).tolist() == [[1, 1], [1, 1]]


def test_refusals(tmp_path) -> None:
    with pytest.raises(ValueError, match="fusion needs the native text tower"):
        vlm.Config(text={"name": "hf:somewhere"}, fusion={})
    with pytest.raises(ConfigError, match="has no mask token"):
        fused_vlm.FusedVLM.build(fused.section(), fused.WORDS._replace(mask=None))
    model, batch = fused.model(), fused.batch(2)
    with pytest.raises(ConfigError, match="too few for a prompt of 1 and 19 written"):
        model.write(torch.ones(2, 20, dtype=torch.long), model.remember(batch))
