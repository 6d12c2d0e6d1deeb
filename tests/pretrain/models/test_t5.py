"""T5's relative positions: published buckets, transformers' own, and no bias where a pair touches vision."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from pretrain.models.t5 import bucket
from tests.pretrain.models import tiny_vlt5

RELATIVE = torch.tensor([-200, -128, -64, -16, -8, -7, -1, 0, 1, 7, 8, 16, 64, 128, 200])
BOTH_WAYS = [15, 15, 14, 10, 8, 7, 1, 0, 17, 23, 24, 26, 30, 31, 31]
CAUSAL = [31, 31, 26, 16, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.check("vl-t5", 6)
@pytest.mark.parametrize(("both", "golden"), [(True, BOTH_WAYS), (False, CAUSAL)])
def test_buckets(both: bool, golden: list[int]) -> None:
    assert bucket(RELATIVE, bidirectional=both).tolist() == golden
    far = torch.arange(-300, 301)
    assert torch.equal(bucket(far, bidirectional=both), T5Attention._relative_position_bucket(far, bidirectional=both))


@pytest.mark.check("vl-t5", 5)
def test_no_pair_that_touches_vision_has_a_bias() -> None:
    encoder, their_encoder = tiny_vlt5.model().text.encoder, tiny_vlt5.theirs("t5").encoder
    own = their_encoder.block[0].layer[0].SelfAttention
    own.relative_attention_bias.load_state_dict(
        encoder.block[0].layer[0].SelfAttention.relative_attention_bias.state_dict()
    )
    bias_1HTT = encoder.joint_bias(9, 5)
    assert bias_1HTT.shape == (1, 2, 14, 14)
    assert not bias_1HTT[:, :, 9:].any() and not bias_1HTT[..., 9:].any()
    assert torch.equal(bias_1HTT[:, :, :9, :9], own.compute_bias(9, 9))
