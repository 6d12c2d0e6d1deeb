"""The native text tower: trimming and padding change nothing, embeddings may replace ids, spreads are CLIP's."""

import torch

from pretrain.models import text
from tests import tiny


def test_padding_and_what_follows_the_end_do_not_matter() -> None:
    tower = tiny.model().text.eval()
    tokens_BT = tiny.batch().tokens_BT
    assert tokens_BT is not None
    longer_BT = torch.cat([tokens_BT, torch.full((len(tokens_BT), 3), tiny.END)], 1)
    zeros_BT = torch.cat([tokens_BT, torch.zeros(len(tokens_BT), 3, dtype=torch.long)], 1)
    expected = tower(tokens_BT).text_BE
    torch.testing.assert_close(tower(longer_BT).text_BE, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(tower(zeros_BT).text_BE, expected, atol=1e-6, rtol=0)


def test_embeddings_replace_ids() -> None:
    tower = tiny.model().text.eval()
    tokens_BT = tiny.batch().tokens_BT
    assert torch.equal(tower(tokens_BT, embeds_BTC=tower.embed(tokens_BT)).text_BE, tower(tokens_BT).text_BE)


def test_initial_spreads_are_clips() -> None:
    torch.manual_seed(0)
    tower = text.NativeText(text.Config(vocab_size=1000, width=512, layers=2, heads=8), 512, end=999)
    block = tower.blocks[0]
    expected = {
        tower.token_embedding.weight: 0.02,
        tower.positional_embedding: 0.01,
        tower.projection.weight: 512**-0.5,
        block.attention.qkv.weight: 512**-0.5,
        block.attention.out.weight: 512**-0.5 * 4**-0.5,
        block.mlp.up.weight: 1024**-0.5,
        block.mlp.down.weight: 512**-0.5 * 4**-0.5,
    }
    for weight, spread in expected.items():
        assert abs(weight.std().item() / spread - 1) < 0.02
