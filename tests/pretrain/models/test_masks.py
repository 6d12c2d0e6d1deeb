"""Masks: every mode as a matrix, alone and mixed; what one token may learn of another, through any number of layers."""

import pytest
import torch
from torch import Tensor

from pretrain.models.attention import mask_from_blocks
from pretrain.models.masks import Mode, interleaved_blocks, stream_mask, text_blocks, text_mask

MATRICES = {
    (Mode.BI, 0): "11000 11000 11111 11111 11111",
    (Mode.FULL, 0): "11111 11111 11111 11111 11111",
    (Mode.CAUSAL, 0): "11000 11000 11100 11110 11111",
    (Mode.PREFIX, 2): "11000 11000 11110 11110 11111",
    (Mode.PREFIX_FULL, 2): "11110 11110 11110 11110 11111",
    (Mode.TEXT_BI, 0): "11000 11000 00111 00111 00111",
    (Mode.TEXT_CAUSAL, 0): "11000 11000 00100 00110 00111",
    (Mode.IMAGE, 0): "11000 11000 00100 00010 00001",
}


def rows(mask_LL: Tensor) -> str:
    return " ".join("".join(str(int(v)) for v in row) for row in mask_LL)


def closure(mask_LL: Tensor) -> Tensor:
    """Return what each token may learn of through any number of layers."""
    found = mask_LL | torch.eye(len(mask_LL), dtype=torch.bool)
    for _ in range(len(found).bit_length()):
        found = (found.float() @ found.float()) > 0
    return found


def cases() -> list[tuple[Mode, int]]:
    return [(mode, prefix) for mode in Mode for prefix in ((0, 1, 2, 5, 8) if "PREFIX" in mode.name else (0,))]


def test_every_mode_is_its_matrix_also_in_one_batch() -> None:
    modes, prefixes = zip(*MATRICES, strict=True)
    mask_BLL = stream_mask(torch.tensor(modes), 2, 3, prefix_B=torch.tensor(prefixes))[:, 0]
    assert [rows(mask) for mask in mask_BLL] == list(MATRICES.values())
    for (mode, prefix), mask_LL in zip(MATRICES, mask_BLL):
        assert torch.equal(stream_mask(torch.tensor([mode]), 2, 3, prefix_B=torch.tensor([prefix]))[0, 0], mask_LL)


@pytest.mark.check("univl", 2)
def test_a_prefix_of_everything_reads_both_ways_and_one_of_nothing_is_causal() -> None:
    def of(mode: Mode, prefix: int) -> Tensor:
        return stream_mask(torch.tensor([mode]), 3, 6, prefix_B=torch.tensor([prefix]))

    assert torch.equal(of(Mode.PREFIX, 6), of(Mode.BI, 0))
    assert torch.equal(of(Mode.PREFIX, 0), of(Mode.CAUSAL, 0))
    assert torch.equal(of(Mode.PREFIX, 1), of(Mode.CAUSAL, 0))


@pytest.mark.check("univl", 12)
@pytest.mark.parametrize(("mode", "prefix"), cases())
def test_the_stream_and_the_text_alone_agree_on_who_reads_whom_in_the_text(mode: Mode, prefix: int) -> None:
    mode_B, prefix_B = torch.tensor([mode, mode]), torch.tensor([prefix, prefix])
    valid_BT = torch.arange(8) < torch.tensor([[8], [5]])
    stream = stream_mask(mode_B, 3, 8, prefix_B=prefix_B, text_valid_BT=valid_BT)[:, :, 3:, 3:]
    assert torch.equal(stream, text_mask(mode_B, 8, prefix_B=prefix_B, valid_BT=valid_BT))


@pytest.mark.check("univl", 8)
@pytest.mark.parametrize(("mode", "prefix"), cases())
def test_no_path_leads_from_what_is_predicted_to_who_predicts_it(mode: Mode, prefix: int) -> None:
    """Places from the last of the prefix on say the next word: none may learn of it through any layers."""
    images, length = 4, 8
    mask_LL = stream_mask(torch.tensor([mode]), images, length, prefix_B=torch.tensor([prefix]))[0, 0]
    known_LL = closure(mask_LL)
    both_ways = mode in (Mode.BI, Mode.FULL, Mode.TEXT_BI)
    says = range(length) if both_ways else range(max(prefix, 1) - 1, length)
    leaks = [(t, u) for t in says for u in range(t + 1, length) if known_LL[images + t, images + u]]
    assert bool(leaks) == both_ways
    if mode not in (Mode.FULL, Mode.PREFIX_FULL):
        assert not known_LL[:images, images:].any(), "a picture's states are the same whatever the text"


def test_the_property_test_finds_the_leak_through_pictures() -> None:
    """Causal text that pictures read: one layer shows nothing, three leak."""
    mask_LL = stream_mask(torch.tensor([Mode.CAUSAL]), 2, 4)[0, 0]
    mask_LL[:2] = True
    assert not mask_LL[2:, 2:].triu(1).any() and closure(mask_LL)[2:, 2:].triu(1).any()


def test_pictures_between_words() -> None:
    image_BL = torch.tensor([[1, 1, 0, 0, 2, 2, 0], [0, 1, 1, 2, 2, 0, 0]])
    mask_BLL = mask_from_blocks(interleaved_blocks(image_BL))[:, 0]
    assert rows(mask_BLL[0]) == "1100000 1100000 1110000 1111000 1111110 1111110 1111111"
    assert rows(mask_BLL[1]) == "1000000 1110000 1110000 1111100 1111100 1111110 1111111"


def test_padding_is_read_by_nobody_and_no_row_is_empty() -> None:
    mode_B = torch.tensor([int(mode) for mode in Mode])
    text_BT = torch.tensor([[True, True, False]]).expand(len(mode_B), -1)
    image_BI = torch.tensor([[True, False]]).expand(len(mode_B), -1)
    mask_BLL = stream_mask(mode_B, 2, 3, text_valid_BT=text_BT, image_valid_BI=image_BI)[:, 0]
    others_BLL = mask_BLL & ~torch.eye(5, dtype=torch.bool)
    assert mask_BLL.any(-1).all() and not others_BLL[:, :, [1, 4]].any()


def test_blocks_of_a_text() -> None:
    mode_B = torch.tensor([Mode.BI, Mode.CAUSAL, Mode.PREFIX, Mode.TEXT_CAUSAL])
    blocks_BT = text_blocks(mode_B, 4, torch.tensor([1, 2, 3, 4]))
    assert blocks_BT.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
