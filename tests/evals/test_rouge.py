"""Rouge-L against the package that the published script uses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from engine.tiny import byte_tokenizer
from qwenlet.evals.rouge import longest_common, rouge_l, words


class Cut:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


SCORER = RougeScorer(["rougeL"], tokenizer=Cut())
TEXTS = st.text(alphabet='abc{}": 1,你', max_size=30)


@given(TEXTS, TEXTS)
def test_it_is_the_published_measure(reference: str, text: str) -> None:
    tokenizer = byte_tokenizer()
    joined = [" ".join(words(one, tokenizer)) for one in (reference, text)]
    assert abs(rouge_l(reference, text, tokenizer) - SCORER.score(*joined)["rougeL"].fmeasure) < 1e-12


def test_tokens_of_white_space_are_none() -> None:
    assert words("a b", byte_tokenizer()) == ["a", "b"]
    assert rouge_l("", "", byte_tokenizer()) == 0.0


def test_the_longest_common_subsequence() -> None:
    assert longest_common("abcbdab", "bdcaba") == 4
    assert longest_common("", "abc") == 0
