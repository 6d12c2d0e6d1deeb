"""OFA: published sizes, masks and modes of the decoder, incremental writing, what a hidden picture cannot change."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain import config, dist, plan, recipe
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.models import base, ofa
from pretrain.models.cache import Cache
from pretrain.models.constraints import Exactly
from pretrain.models.generate import generate
from pretrain.models.ofa_layers import DropPath
from pretrain.models.patch_dropout import scores
from pretrain.models.writing import Options

ROOT = Path(__file__).resolve().parents[3]
TEXT, CODES, BINS = 40, 16, 10
WORDS = base.Vocabulary(TEXT + CODES + BINS, end=2, pad=1, start=0)
PUBLISHED = {
    "tiny": 33_488_336, "medium": 92_892_000, "base": 182_238_536, "large": 472_977_152, "huge": 929_486_848,
}  # fmt: skip


def section(**keys: object) -> ofa.Config:
    """Return an OFA of a few thousand parameters: 4 x 4 patches, 4 x 4 codes."""
    small = {
        "width": 16, "hidden": 32, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "stem": (1, 1, 1),
        "stem_width": 4, "image_size": 64, "code_image_size": 32, "codes": CODES, "bins": BINS, "positions": 24,
        "source_length": 12, "target_length": 18, "token_bucket": 8, "image_bucket": 6,
    }  # fmt: skip
    return ofa.Config(**{**small, **keys})


def model(*, seed: int = 0, moved: bool = True, **keys: object) -> ofa.OFA:
    """Return a float64 model; `moved`: with relative tables, norms and gains away from where they start."""
    dist.seed_step(seed, "ofa")
    made = ofa.OFA.build(section(**keys), WORDS).double()
    if moved:
        with torch.no_grad():
            for p in made.parameters():
                p += 0.1 * torch.randn_like(p)
    return made.eval()


def batch(rows: int = 4, *, codes: bool = True, seed: int = 0, written: int = 7) -> Batch:
    """Return noise pictures of all rows but the last, source texts of unequal length, and what is written."""
    draw = torch.Generator().manual_seed(seed)
    valid_BT = torch.arange(6) < torch.tensor([6, 4, 5, 6])[:rows, None]
    tokens_BT = torch.randint(3, TEXT, (rows, 6), generator=draw).masked_fill(~valid_BT, WORDS.pad)
    decoder_tokens_BU = torch.randint(3, WORDS.size, (rows, written), generator=draw)
    decoder_tokens_BU[:, 0] = 0
    codes_B = torch.tensor([False, True, False, True])[:rows] if codes else torch.zeros(rows, dtype=torch.bool)
    return Batch(
        keys=[f"{seed}-{n}" for n in range(rows)],
        image_NCHW=torch.randn(rows - 1, 3, 64, 64, generator=draw),
        owner_N=torch.arange(rows - 1),
        tokens_BT=tokens_BT,
        valid_BT=valid_BT,
        decoder_tokens_BU=decoder_tokens_BU,
        codes_B=codes_B,
        draw_B=torch.randint(2**62, (rows,), generator=draw),
    )


@pytest.mark.check("ofa", 1)
@pytest.mark.parametrize(("size", "count"), PUBLISHED.items())
def test_published_sizes(size: str, count: int) -> None:
    read = config.load(recipe.Recipe, ROOT / f"pretrain/configs/ofa_{size}.yaml", ["train.batch_size=8"])
    with torch.device("meta"):
        made = ofa.OFA.build(read.model, base.Vocabulary(59_457, end=2, pad=1, start=0))
    assert sum(p.numel() for p in made.parameters()) == count


@pytest.mark.slow
@pytest.mark.check("ofa", 1)
def test_a_plan_says_the_size() -> None:
    read = config.load(recipe.Recipe, ROOT / "pretrain/configs/ofa_tiny.yaml", ["train.batch_size=8"])
    found = plan.resolve(read, plan.Machines(cpu=False, gpu="H100"))
    assert found.step.trained == PUBLISHED["tiny"] and found.step.rows == 8


@pytest.mark.check("ofa", 4)
def test_symbols_are_codes_then_bins() -> None:
    symbols = ofa.Config().symbols
    first = 59_457 - len(symbols)
    assert (first + symbols.index("<code_0>"), first + symbols.index("<code_8191>")) == (50_265, 58_456)
    assert (first + symbols.index("<bin_0>"), first + symbols.index("<bin_999>")) == (58_457, 59_456)


@pytest.mark.check("ofa", 2)
def test_relative_tables_start_at_zero_and_know_their_place() -> None:
    made, given = model(moved=False), batch()
    before = made(given).logits_BUV
    tables = [part for name, part in made.named_modules() if "rel_pos_table_list." in name]
    assert len(tables) == 8 and all(not table.weight.any() for table in tables)
    shared = {}

    def keep(module, args):
        shared["bias"] = args[1].of(args[2])

    made.encoder.layers[0].register_forward_pre_hook(keep)
    made.encode(given)
    plain = shared["bias"]
    with torch.no_grad():
        made.encoder.positions.image_rel_pos_table_list[0].weight.normal_()
    made.encode(given)
    moved = shared["bias"]
    assert torch.equal(plain[:, :, 16:], moved[:, :, 16:]) and torch.equal(plain[..., 16:], moved[..., 16:])
    assert not torch.equal(plain[:, :, :16, :16], moved[:, :, :16, :16])
    torch.nn.init.zeros_(made.encoder.positions.image_rel_pos_table_list[0].weight)
    for number in range(2):  # a constant in all buckets is no position
        for table in made.decoder.positions.tables(number):
            torch.nn.init.constant_(table.weight, 0.7)
    torch.testing.assert_close(made(given).logits_BUV, before, rtol=0, atol=1e-12)


@pytest.mark.check("ofa", 3)
def test_a_row_without_picture_does_not_depend_on_pixels() -> None:
    made, given = model(), batch()
    whole = made(given)
    alone = replace(given, image_NCHW=None, owner_N=None)
    torch.testing.assert_close(made(alone).logits_BUV[3], whole.logits_BUV[3], rtol=0, atol=1e-12)
    assert whole.encoded.valid_BS[:, :16].any(1).tolist() == [True, True, True, False]
    assert made(alone).encoded.valid_BS[:, 0].tolist() == [False] * 4
    other = replace(given, image_NCHW=given.image_NCHW + 1)
    torch.testing.assert_close(made(other).logits_BUV[3], whole.logits_BUV[3], rtol=0, atol=1e-12)
    assert (made(other).logits_BUV[:3] - whole.logits_BUV[:3]).abs().amax((1, 2)).min() > 1e-6


@pytest.mark.check("ofa", 3)
def test_sampling_all_patches_is_sampling_none() -> None:
    made, given = model(dropout=0.0, drop_path=0.0, batch_norm="frozen", sample_patches=16), batch()
    plain = made(given).logits_BUV
    made.train()
    torch.testing.assert_close(made(given).logits_BUV, plain, rtol=0, atol=1e-12)
    made.config.sample_patches = 5
    few = made(given)
    small = replace(given, image_NCHW=given.image_NCHW[..., :32, :32])
    assert made(small).encoded.states_BSC.shape[1] == 4 + 6, "smaller pictures keep all of their patches"
    assert few.encoded.states_BSC.shape[1] == 5 + 6
    torch.testing.assert_close(few.logits_BUV[3], plain[3], rtol=0, atol=1e-12)  # it reads no picture
    assert torch.equal(made(given).logits_BUV, few.logits_BUV), "the draw is the sample's"
    alone = made(given.split(1)[2]).logits_BUV
    torch.testing.assert_close(alone[0], few.logits_BUV[2], rtol=0, atol=1e-12)
    made.eval()
    torch.testing.assert_close(made(given).logits_BUV, plain, rtol=0, atol=1e-12)


def test_missing_pictures_leave_no_trace_in_the_statistics() -> None:
    made, given = model().train(), batch()
    made(replace(given, image_NCHW=None, owner_N=None)).logits_BUV.sum().backward()
    norm = made.encoder.embed_images.bn1
    assert not norm.running_mean.any() and norm.weight.grad is not None and not norm.weight.grad.any()
    made(given).logits_BUV.sum().backward()
    kept = norm.running_mean.clone()
    again = model().train()
    again(given.split(3)[0]).logits_BUV.sum().backward()
    torch.testing.assert_close(again.encoder.embed_images.bn1.running_mean, kept, rtol=0, atol=1e-12)


def test_positions_travel_with_patches() -> None:
    made, given = model(dropout=0.0, drop_path=0.0, batch_norm="frozen", sample_patches=5), batch(codes=False)
    made.train()
    sampled = made.encode(given)
    kept_BK = scores(given.draw_B, 16).argsort(1)[:, :5].sort(1).values
    table = made.encoder.positions
    rows = [table.image_pos_ln(table.embed_image_positions(made_id(kept))) for kept in kept_BK]
    torch.testing.assert_close(sampled.positions_BSC[:, :5], torch.stack(rows), rtol=0, atol=1e-12)


def made_id(kept_K: torch.Tensor) -> torch.Tensor:
    """Return the positions of patches of a 4 x 4 grid among 6 columns."""
    return kept_K // 4 * 6 + kept_K % 4 + 1


@pytest.mark.check("ofa", 7)
def test_writing_token_by_token_gives_the_logits_of_a_whole_pass() -> None:
    made, given = model(), batch(written=18)  # 16 codes lie between the start and the fillers
    whole = made(given).logits_BUV
    memory, cache = made.remember(given), Cache()
    steps = [made.write(given.decoder_tokens_BU[:, n : n + 1], memory, cache) for n in range(5)]
    steps.append(made.write(given.decoder_tokens_BU[:, 5:], memory, cache))
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(made.write(given.decoder_tokens_BU, memory), whole, rtol=0, atol=1e-12)


@pytest.mark.check("ofa", 7)
def test_a_beam_may_reorder_rows_that_write_different_things() -> None:
    made, given = model(), batch()
    index_B = torch.tensor([3, 1, 1, 0, 2])
    memory, cache = made.remember(given), Cache()
    made.write(given.decoder_tokens_BU[:, :4], memory, cache)
    cache.select(index_B)
    found = made.write(given.decoder_tokens_BU[index_B, 4:], memory.rows(index_B), cache)
    torch.testing.assert_close(found, made(given).logits_BUV[index_B, 4:], rtol=0, atol=1e-12)


@pytest.mark.check("ofa", 7)
@pytest.mark.parametrize("options", [Options(), Options(beams=3), Options(sample=True, keep=2, top_k=4)])
def test_pictures_are_written_in_codes(options: Options) -> None:
    made, given = model(), batch()
    given.codes_B = torch.ones(4, dtype=torch.bool)
    only = Exactly(TEXT, CODES, tokens=16, end=WORDS.end)
    cached, fresh = (generate(made, given, options, constraint=only, cached=cached) for cached in (True, False))
    for ours, theirs in zip(cached, fresh):
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
        assert all(TEXT <= token < TEXT + CODES for one in ours for token in one.tokens[:16]) and ours[0].tokens


def test_codes_have_positions_of_their_own() -> None:
    made, given = model(), batch()
    text = replace(given, codes_B=torch.zeros(4, dtype=torch.bool))
    changed = (made(given).logits_BUV - made(text).logits_BUV).abs().amax((1, 2))
    assert changed[[0, 2]].max() == 0 and changed[[1, 3]].min() > 1e-6
    assert made.decoder.places(0, 19, torch.device("cpu")).tolist() == [
        0, 1, 2, 3, 4, 7, 8, 9, 10, 13, 14, 15, 16, 19, 20, 21, 22, 36, 36,
    ]  # fmt: skip


def test_the_middle_of_a_picture_is_hidden_where_asked() -> None:
    made, given = model(), batch()
    given.hole_N = torch.tensor([False, True, False])
    other = given.image_NCHW.clone()
    other[:, :, 16:48, 16:48] += 1
    change = (made(replace(given, image_NCHW=other)).logits_BUV - made(given).logits_BUV).abs().amax((1, 2))
    assert change[1] == 0 and change[[0, 2]].min() > 1e-6
    picture = made._pictures(given).image_NCHW
    assert not picture[1, :, 16:48, 16:48].any() and picture[1].any() and picture[0, :, 16:48, 16:48].all()


def test_padding_of_the_source_is_not_read() -> None:
    made, given = model(), batch()
    tokens_BT = given.tokens_BT.masked_fill(~given.valid_BT, 7)
    torch.testing.assert_close(
        made(replace(given, tokens_BT=tokens_BT)).logits_BUV, made(given).logits_BUV, rtol=0, atol=1e-12
    )
    longer = replace(
        given,
        tokens_BT=torch.nn.functional.pad(given.tokens_BT, (0, 3), value=1),
        valid_BT=torch.nn.functional.pad(given.valid_BT, (0, 3)),
    )
    torch.testing.assert_close(made(longer).logits_BUV, made(given).logits_BUV, rtol=0, atol=1e-12)


def test_what_comes_later_is_not_read() -> None:
    made, given = model(), batch()
    tokens_BU = given.decoder_tokens_BU.clone()
    tokens_BU[:, 4:] = 9
    found = made(replace(given, decoder_tokens_BU=tokens_BU)).logits_BUV
    torch.testing.assert_close(found[:, :4], made(given).logits_BUV[:, :4], rtol=0, atol=1e-12)


@pytest.mark.check("ofa", 9)
def test_head_gains_start_as_no_gain() -> None:
    made, given = model(moved=False), batch()
    gains = [p for name, p in made.named_parameters() if name.endswith("c_attn")]
    assert len(gains) == 6 and all(torch.equal(g, torch.ones_like(g)) for g in gains)
    before = made(given).logits_BUV
    with torch.no_grad():
        gains[0][0] = 2.0
    assert not torch.equal(made(given).logits_BUV, before)


def test_positions_are_added_to_embeddings_only_where_asked() -> None:
    given = batch()
    plain = model()
    for key in ("entangled_encoder", "entangled_decoder"):
        other = model(**{key: True})
        assert not torch.equal(other(given).logits_BUV, plain(given).logits_BUV)
        stack = getattr(other, key.removeprefix("entangled_"))
        stack.positions.embed_positions.weight.data.zero_()
        stack.positions.embed_image_positions.weight.data.zero_()
        now = other(given).logits_BUV
        setattr(other.config, key, False)
        torch.testing.assert_close(other(given).logits_BUV, now, rtol=0, atol=1e-12)


def test_larger_pictures_stretch_the_positions_they_were_trained_with() -> None:
    made = model(interpolate_from=32)
    given = batch()
    found = made.encode(given).positions_BSC
    table = made.encoder.positions
    expected = table.image_pos_ln(table.resized(4, 4, 2))
    torch.testing.assert_close(found[:, :16], expected, rtol=0, atol=1e-12)
    same = model(interpolate_from=64)
    plain = model()
    assert torch.equal(same(given).logits_BUV, plain(given).logits_BUV)


@pytest.mark.parametrize("every", [True, 2])
def test_recomputed_layers_have_the_same_gradients(every: bool | int) -> None:
    given, grads = batch(), []
    for checkpointing in (False, every):
        made = model(checkpointing=checkpointing).train()
        torch.manual_seed(0)
        made(given).logits_BUV.square().mean().backward()
        grads.append({name: p.grad for name, p in made.named_parameters()})
    assert all(grad is not None for grad in grads[0].values()), "every parameter is used in every step"
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_dropped_paths_are_whole_rows() -> None:
    torch.manual_seed(0)
    out = DropPath(0.5).train()(torch.ones(64, 3, 2))
    assert set(out.flatten().tolist()) == {0.0, 2.0} and torch.equal(out, out[:, :1, :1].expand_as(out))
    assert [layer.drop_path.rate for layer in model(drop_path=0.2).decoder.layers] == [0.0, 0.2]


def test_mistakes_are_refused() -> None:
    for keys in ({"heads": 3}, {"image_size": 50}, {"image_size": 112}, {"code_image_size": 56}, {"stem": "resnet18"},
                 {"target_length": 27}, {"source_length": 25}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(keys)).split("_")[0] if "heads" not in keys else "width"):
            section(**keys)
    with pytest.raises(ConfigError, match="room"):
        ofa.OFA.build(section(), WORDS._replace(size=26))
    with pytest.raises(ConfigError, match="66 ids"):
        ofa.OFA.build(section(vocab_size=60), WORDS)
    assert ofa.OFA.build(section(vocab_size=70), WORDS).embed_tokens.num_embeddings == 70
    given = batch()
    twice = replace(given, image_NCHW=torch.zeros(5, 3, 64, 64), owner_N=torch.arange(5) % 4)
    with pytest.raises(ConfigError, match="one a row"):
        model().encode(twice)
    with pytest.raises(ConfigError, match="image_bucket"):
        model().encode(replace(given, image_NCHW=torch.zeros(3, 3, 128, 128)))


def test_depths_grow_from_embeddings_to_the_last_norm() -> None:
    found = model().depths()
    assert found["encoder.embed_images.conv1.weight"].layer == 0
    assert found["encoder.layers.1.fc1.weight"].layer == 2 == found["encoder.layer_norm.weight"].layer
    assert found["decoder.positions.image_rel_pos_table_list.0.weight"].layer == 1
    assert found["decoder.positions.embed_positions.weight"].layer == 0


def test_bfloat16_is_close() -> None:
    made, given = model().float(), batch()
    plain = made(given).logits_BUV
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = made(given).logits_BUV.float()
    assert torch.isfinite(low).all() and (low - plain).abs().max() < 0.1 * plain.abs().max()
