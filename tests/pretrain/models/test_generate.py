"""Writing: the cache changes nothing, one beam is greedy, many beams find the best of all, transformers agrees."""

import itertools
import random

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from pretrain.data.trie import Trie
from pretrain.models.beam import beam
from pretrain.models.candidates import log_likelihood
from pretrain.models.constraints import Answers, Exactly, repeating
from pretrain.models.generate import drawn, generate
from pretrain.models.writing import Options, Pen
from tests.pretrain.models import writers
from tests.pretrain.models.writers import END, WORDS, TinyWriter

PROMPTS = [[3], [], [4, 5, 6], [7, 1]]
WAYS = {
    "greedy": Options(max_tokens=9),
    "beam": Options(beams=3, keep=3, max_tokens=9),
    "long": Options(beams=4, keep=2, max_tokens=9, min_tokens=5, no_repeat=2, length_penalty=1.7),
    "sample": Options(sample=True, keep=3, max_tokens=9, temperature=1.5, top_k=6, top_p=0.9),
}
RULES = {
    "any": None,
    "codes": Exactly(2, 5, tokens=3, end=END),
    "answers": Answers([[2, 3], [2, 4, 5], [6], [7, 7, 7, 7]], end=END),
}


def same(left, right) -> None:
    assert [[h.tokens for h in row] for row in left] == [[h.tokens for h in row] for row in right]
    for one, other in zip(itertools.chain(*left), itertools.chain(*right)):
        assert one.score == pytest.approx(other.score, abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["free", "prompted"])
@pytest.mark.parametrize("rule", RULES)
def test_the_cache_and_the_neighbours_change_nothing(way: str, prompts, rule: str) -> None:
    model, batch, options, rule = TinyWriter(), writers.given(), WAYS[way], RULES[rule]
    if rule is not None:  # which says by itself what may come
        options = options.model_copy(update={"min_tokens": 0, "no_repeat": 0})
    found = generate(model, batch, options, prompts=prompts, constraint=rule)
    same(found, generate(model, batch, options, prompts=prompts, constraint=rule, cached=False))
    alone = [
        generate(model, one, options, prompts=None if prompts is None else [prompts[n]], constraint=rule)[0]
        for n, one in enumerate(batch.split(1))
    ]
    same(found, alone)
    assert all(END not in h.tokens for row in found for h in row)


def test_one_beam_is_greedy_and_scores_are_log_likelihoods() -> None:
    model, batch, ended = TinyWriter(seed=4), writers.given(6), 0
    for options in (Options(max_tokens=12), Options(max_tokens=12, no_repeat=2, length_penalty=0.0)):
        greedy = generate(model, batch, options, prompts=[[n] for n in range(6)])
        memory = model.remember(batch)
        searched = beam(Pen(model, memory, options, prompts=[[n] for n in range(6)]))
        assert [[h.tokens for h in row] for row in searched] == [[h.tokens for h in row] for row in greedy]
        score_B = log_likelihood(model, memory, [h.tokens for [h] in greedy], prompts=[[n] for n in range(6)])
        for [one], score in zip(greedy, score_B.tolist()):
            if len(one.tokens) < 12:
                ended += 1
                assert one.score == pytest.approx(score, abs=1e-5)
    assert ended


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_many_beams_find_the_best_of_all(penalty: float) -> None:
    words, most = 5, 4
    model = TinyWriter(words=words, first=3, end=4)
    batch = writers.given(3, words=words)
    options = Options(beams=words**most, keep=5, max_tokens=most, length_penalty=penalty)
    found = generate(model, batch, options)
    texts = [list(t) for n in range(most) for t in itertools.product(range(words - 1), repeat=n)]
    for row, one in zip(found, batch.split(1)):
        memory = model.remember(one).rows(torch.zeros(len(texts), dtype=torch.long))
        ended = (log_likelihood(model, memory, texts) / torch.tensor([len(t) + 1.0 for t in texts]) ** penalty).tolist()
        whole = {tuple(t): s for t, s in zip(texts, ended)}
        # a text that is cut at `most` tokens has no end token
        full = [list(t) for t in itertools.product(range(words - 1), repeat=most)]
        memory = model.remember(one).rows(torch.zeros(len(full), dtype=torch.long))
        read = torch.tensor([[3, *t[:-1]] for t in full])
        said = model.write(read, memory).float().log_softmax(2).gather(2, torch.tensor(full)[..., None])[..., 0].sum(1)
        whole |= {tuple(t): s for t, s in zip(full, (said / most**penalty).tolist())}
        best = sorted(whole, key=whole.__getitem__, reverse=True)[:5]
        assert [tuple(h.tokens) for h in row] == best
        assert [h.score for h in row] == pytest.approx([whole[t] for t in best], abs=1e-5)


@pytest.mark.check("ofa", 5)
def test_answers_and_codes_are_what_was_asked_for() -> None:
    """Greedy, beams and samples write an answer of the list, or exactly so many of the codes, and nothing else."""
    model, batch = TinyWriter(), writers.given(5)
    answers = [[2, 3], [2, 4, 5], [6], [2]]
    for options in (Options(), Options(beams=3, keep=3), Options(sample=True, keep=20)):
        for row in generate(model, batch, options, constraint=Answers(answers, end=END), prompts=[[1]] * 5):
            assert row and all(h.tokens in answers for h in row)
        for row in generate(model, batch, options, constraint=Exactly(3, 4, tokens=4, end=END)):
            assert all(len(h.tokens) == 4 and set(h.tokens) <= {3, 4, 5, 6} for h in row)


def test_as_many_beams_as_answers_rank_them_all() -> None:
    model, batch = TinyWriter(), writers.given(5)
    answers = [[2, 3], [2, 4, 5], [6], [2], [7, 3, 3, 3]]
    rule = Answers(answers, end=END)
    found = generate(model, batch, Options(beams=5, keep=5, length_penalty=0.0), constraint=rule)
    for row, one in zip(found, batch.split(1)):
        memory = model.remember(one).rows(torch.zeros(5, dtype=torch.long))
        score = log_likelihood(model, memory, answers, constraint=rule)
        assert score.exp().sum().item() == pytest.approx(1.0), "a softmax over the trie is a distribution over answers"
        order = score.argsort(descending=True).tolist()
        assert [h.tokens for h in row] == [answers[n] for n in order]
        assert [h.score for h in row] == pytest.approx(score[order].tolist(), abs=1e-5)


def test_answers_walk_the_trie() -> None:
    rule = Answers([[2, 3], [2], [5]], end=END)
    state = rule.start(3, "cpu")
    assert [row.nonzero()[:, 0].tolist() for row in rule.allowed(state, WORDS)] == [[2, 5]] * 3
    state = rule.advance(state, torch.tensor([2, 5, 8]))  # 8 strays
    assert [row.nonzero()[:, 0].tolist() for row in rule.allowed(state, WORDS)] == [[3, END], [END], [END]]
    state = rule.advance(state, torch.tensor([END, END, 3]))
    assert [row.nonzero()[:, 0].tolist() for row in rule.allowed(state, WORDS)] == [[END]] * 3


def test_answers_are_the_trie_of_training() -> None:
    source, answers = random.Random(0), set()
    while len(answers) < 30:
        answers.add(tuple(source.choices(range(2, 9), k=source.randint(1, 4))))
    rule, trie = Answers(sorted(answers), end=END), Trie(sorted(answers), end=END)
    for _ in range(200):
        prefix = source.choices(range(2, 9), k=source.randint(0, 5))
        state = rule.start(1, "cpu")
        for token in prefix:
            state = rule.advance(state, torch.tensor([token]))
        assert rule.allowed(state, WORDS)[0].nonzero()[:, 0].tolist() == trie.next(prefix)


@pytest.mark.parametrize("way", ["greedy", "beam", "sample"])
def test_rows_stop_where_the_model_has_no_more_places(way: str) -> None:
    """Each row as if it alone had been given as many tokens as it has room for."""
    model, batch, options = TinyWriter(), writers.given(), WAYS[way]
    room = [1, 4, 100, 2]
    found = generate(model, batch, options, prompts=PROMPTS, room=room)
    for n, one in enumerate(batch.split(1)):
        less = options.model_copy(update={"max_tokens": min(options.max_tokens, room[n])})
        same([found[n]], generate(model, one, less, prompts=[PROMPTS[n]]))


def test_no_sequence_twice() -> None:
    tokens = torch.tensor([[1, 2, 3, 1, 2], [4, 4, 4, 4, 4]])
    assert [row.nonzero()[:, 0].tolist() for row in repeating(tokens, 3, 6)] == [[3], [4]]
    assert [row.nonzero()[:, 0].tolist() for row in repeating(tokens, 1, 6)] == [[1, 2, 3], [4]]
    assert not repeating(tokens, 6, 6).any()


def test_samples_follow_the_distribution_and_the_draw() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    place = (torch.arange(20_000) + 0.5) / 20_000

    def share(**options: object) -> list[float]:
        token = drawn(logits, place, Options(sample=True, **options))
        return (torch.bincount(token, minlength=4) / 20_000).tolist()

    assert share() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-3)
    assert share(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    assert share(top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    assert share(top_p=0.01) == [1, 0, 0, 0]
    assert share(temperature=0.5)[0] == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=1e-3)
    model, batch = TinyWriter(), writers.given()
    first, again, other = (
        generate(model, batch, Options(sample=True, keep=4, seed=seed, temperature=3.0)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len({tuple(h.tokens) for h in first[0]}) > 1


def test_options_that_do_nothing_are_refused() -> None:
    for wrong in ({"keep": 2}, {"top_k": 3}, {"sample": True, "beams": 2}, {"min_tokens": 30}):
        with pytest.raises(ValidationError):
            Options(**wrong)


def theirs(name: str) -> writers.Theirs:
    torch.manual_seed(0)
    if name == "t5":
        args = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=30, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **args)
        )
        return writers.Theirs(model.eval(), first=(0,), end=1)
    if name == "bart":
        args = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
                "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
        ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        model = BartForConditionalGeneration(BartConfig(vocab_size=30, init_std=0.6, forced_eos_token_id=None,
                                                        **args, **ids))  # fmt: skip
        return writers.Theirs(model.eval(), first=(2,), end=2)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1, initializer_range=0.5)
    )
    return writers.Theirs(model.eval(), first=(0,), end=1)


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        Options(max_tokens=8),
        Options(max_tokens=8, no_repeat=2, min_tokens=4),
        Options(beams=4, keep=4, max_tokens=8),
        Options(beams=3, keep=3, max_tokens=10, length_penalty=0.0),
        Options(beams=3, keep=3, max_tokens=10, length_penalty=2.0, no_repeat=2, min_tokens=5),
    ],
    ids=["greedy", "greedy-rules", "beam", "beam-sum", "beam-rules"],
)
def test_transformers_writes_the_same(name: str, options: Options) -> None:
    model, batch = theirs(name), writers.given(5, words=30)
    found = generate(model, batch, options, cached=False)
    seen = {"input_ids": batch.tokens_BT, "attention_mask": batch.valid_BT.long()}
    if name == "gpt2":
        start = torch.zeros(5, 1, dtype=torch.long)
        seen = {"input_ids": start, "attention_mask": torch.ones_like(start)}
    more = {"length_penalty": options.length_penalty} if options.beams > 1 else {}
    out = model.model.generate(
        **seen, num_beams=options.beams, num_return_sequences=options.keep, do_sample=False,
        max_new_tokens=options.max_tokens, min_new_tokens=options.min_tokens or None, pad_token_id=0,
        no_repeat_ngram_size=options.no_repeat, return_dict_in_generate=True, output_scores=True, **more,
    )  # fmt: skip
    expected = [sequence[1:].tolist() for sequence in out.sequences]
    cut = [tokens[: tokens.index(model.end)] if model.end in tokens else tokens for tokens in expected]
    mine = [h for row in found for h in row]
    assert [h.tokens for h in mine] == [tokens[: len(h.tokens)] for tokens, h in zip(cut, mine)]
    assert all(len(h.tokens) <= len(tokens) and not any(tokens[len(h.tokens) :]) for tokens, h in zip(cut, mine))
    if options.beams > 1:
        assert [h.score for h in mine] == pytest.approx(out.sequences_scores.tolist(), abs=1e-4)
