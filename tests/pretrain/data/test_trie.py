"""The trie against plain enumeration of its sequences."""

import random

import pytest

from pretrain.data.trie import Trie

END = 9
ANSWERS = [[1], [1, 2], [1, 2, 3], [4, 2], [5]]


def plain(prefix: list[int]) -> list[int]:
    whole = [[*answer, END] for answer in ANSWERS]
    return sorted({one[len(prefix)] for one in whole if one[: len(prefix)] == prefix and len(one) > len(prefix)}) or [
        END
    ]


@pytest.fixture
def trie() -> Trie:
    return Trie(ANSWERS, end=END)


def test_next_is_enumeration(trie):
    rng = random.Random(0)
    prefixes = [[], *ANSWERS, *([rng.randint(1, 5) for _ in range(rng.randint(1, 4))] for _ in range(100))]
    assert [trie.next(prefix) for prefix in prefixes] == [plain(prefix) for prefix in prefixes]
    assert trie.next([1, 2]) == [3, END] and trie.next([7]) == [END]


@pytest.mark.check("ofa", 5)
def test_what_it_leads_to_is_what_was_put_in(trie):
    found = []

    def walk(prefix):
        for token in trie.next(prefix):
            if token == END:
                found.append(prefix)
            else:
                walk([*prefix, token])

    walk([])
    assert sorted(found) == sorted(ANSWERS)
    assert all(answer in trie for answer in ANSWERS) and [4] not in trie and [] not in trie
