"""Candidates: every score is that of the text alone, chunks and preselection change none, the best is the trie's."""

import pytest
import torch

from pretrain.models.candidates import log_likelihood, rank
from pretrain.models.constraints import Answers
from pretrain.models.generate import generate
from pretrain.models.writing import Options
from tests.pretrain.models import writers
from tests.pretrain.models.writers import END, START, TinyWriter

ANSWERS = [[2, 3], [2, 4, 5], [6], [2], [7, 3, 3, 3]]
PROMPTS = [[3], [], [4, 5, 6]]


def by_hand(model: TinyWriter, memory, prompt: list[int], answer: list[int]) -> float:
    """Return the log-probability of an answer, one token after the other."""
    total, read = 0.0, [START, *prompt]
    for token in [*answer, END]:
        total += model.write(torch.tensor([read]), memory)[0, -1].log_softmax(0)[token].item()
        read.append(token)
    return total


def test_scores_are_those_of_each_text_alone() -> None:
    model, batch = TinyWriter(), writers.given(3)
    memory = model.remember(batch)
    whole = rank(model, memory, ANSWERS, prompts=PROMPTS)
    for row in range(3):
        alone = memory.rows(torch.tensor([row]))
        assert whole[row].tolist() == pytest.approx([by_hand(model, alone, PROMPTS[row], a) for a in ANSWERS], abs=1e-5)
    for chunk in (1, 2, 100):
        torch.testing.assert_close(rank(model, memory, ANSWERS, prompts=PROMPTS, chunk=chunk), whole)


@pytest.mark.check("ofa", 5)
def test_the_best_candidate_is_the_best_of_the_trie() -> None:
    """All-candidate argmax = exhaustive enumeration = trie beam with as many beams as candidates, on five answers."""
    model, batch = TinyWriter(seed=1), writers.given(6)
    rule = Answers(ANSWERS, end=END)
    score = rank(model, model.remember(batch), ANSWERS, constraint=rule, chunk=2)
    torch.testing.assert_close(score.exp().sum(1), torch.ones(6))
    beam = generate(model, batch, Options(beams=5, length_penalty=0.0), constraint=rule)
    assert [h.tokens for [h] in beam] == [ANSWERS[n] for n in score.argmax(1).tolist()]


def test_preselection_by_the_first_token() -> None:
    model, batch = TinyWriter(), writers.given(3)
    memory = model.remember(batch)
    whole = rank(model, memory, ANSWERS, prompts=PROMPTS)
    some = rank(model, memory, ANSWERS, prompts=PROMPTS, likeliest=3, chunk=2)
    assert (some.isfinite().sum(1) == 3).all()
    torch.testing.assert_close(some[some.isfinite()], whole[some.isfinite()])
    first = torch.tensor([answer[0] for answer in ANSWERS])
    for row in range(3):
        read = torch.tensor([[START, *PROMPTS[row]]])
        ahead = model.write(read, memory.rows(torch.tensor([row])))[0, -1][first]
        kept = some[row].isfinite()
        assert ahead[kept].min() >= ahead[~kept].max()
    torch.testing.assert_close(rank(model, memory, ANSWERS, prompts=PROMPTS, likeliest=9), whole)


def test_an_empty_text_is_only_its_end() -> None:
    model, batch = TinyWriter(), writers.given(2)
    memory = model.remember(batch)
    read = torch.full((2, 1), START)
    expected = model.write(read, memory)[:, 0].log_softmax(1)[:, END].float()
    torch.testing.assert_close(log_likelihood(model, memory, [[], []]), expected)
