"""Tokens: packing is exact and seeded, documents end with a separator, evaluation text is cut as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from regrow.engines import tokens
from regrow.engines.texts import Document
from regrow.engines.tokens import blocks, check_vocabulary, separator, text_blocks
from regrow.errors import BrokenModel, TextError

BOS, EOS = 0, 1


def tokenizer(**special: str) -> Any:
    """Words w2 .. w99 have ids 2 .. 99; calling it plainly puts <s> in front, as LLaMA's does."""
    vocabulary = {"<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(2, 100)}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=bare, **special)
    if "bos_token" in special:
        made.add_bos_token = True
        made.update_post_processor()
    return made


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}


def words(*ids: int) -> Document:
    return Document("test", " ".join(f"w{i}" for i in ids))


def test_packing_by_hand() -> None:
    # 7 8 </s> 9 </s> 4 5 6 </s> in some order of documents: two blocks of four, one token dropped
    documents = [words(7, 8), words(9), words(4, 5, 6)]
    seed = next(
        s for s in range(99) if torch.randperm(3, generator=torch.Generator().manual_seed(s)).tolist() == [2, 0, 1]
    )
    rows = blocks(documents, tokenizer(**BOTH), block=4, tokens=None, seed=seed)
    assert rows.tolist() == [[4, 5, 6, EOS], [7, 8, EOS, 9]]
    assert rows.dtype == torch.int64


def test_packing_loses_and_repeats_nothing() -> None:
    documents = [words(*range(start, start + 1 + start % 5)) for start in range(2, 90)]
    rows = blocks(documents, tokenizer(**BOTH), block=7, tokens=None, seed=3)
    every = [[int(word[1:]) for word in d.text.split()] for d in documents]
    assert rows.numel() == sum(len(ids) + 1 for ids in every) // 7 * 7
    found: list[list[int]] = [[]]
    for i in rows.flatten().tolist():
        found.append([]) if i == EOS else found[-1].append(i)
    *whole, cut = found  # the last one may have lost its end with the tail
    assert all(whole.count(ids) == 1 and ids in every for ids in whole)
    assert any(ids[: len(cut)] == cut for ids in every if ids not in whole)


def test_order_is_the_seed_s_and_leaves_the_global_generator_alone() -> None:
    documents = [words(i) for i in range(2, 90)]
    state = torch.get_rng_state()
    first, again, other = (blocks(documents, tokenizer(**BOTH), block=8, tokens=None, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    rows = first.flatten()
    assert rows[rows != EOS].tolist() != sorted(rows[rows != EOS].tolist())


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (BOTH, [9, EOS, 9, EOS]),
        ({"eos_token": "</s>"}, [9, EOS, 9, EOS]),
        ({"bos_token": "<s>"}, [9, BOS, 9, BOS]),
        ({}, [9] * 4),
    ],
)
def test_separator_is_eos_else_bos_else_nothing(special: dict[str, str], expected: list[int]) -> None:
    rows = blocks([words(9)] * 4, tokenizer(**special), block=4, tokens=4, seed=0)
    assert rows.tolist() == [expected]
    assert separator(tokenizer(**special)) == [i for i in expected[1:2] if i != 9]


@pytest.mark.parametrize(("asked", "count"), [(1, 1), (8, 1), (15, 1), (16, 2), (40, 5), (10_000, 22), (None, 22)])
def test_tokens_bound_the_number_of_blocks(asked: int | None, count: int) -> None:
    rows = blocks([words(i) for i in range(2, 90)], tokenizer(**BOTH), block=8, tokens=asked, seed=0)
    assert rows.shape == (count, 8)
    assert torch.equal(
        rows, blocks([words(i) for i in range(2, 90)], tokenizer(**BOTH), block=8, tokens=None, seed=0)[:count]
    )


def test_reading_stops_when_there_is_enough() -> None:
    seen = []
    inner = tokenizer(**BOTH)

    class Counting:
        eos_token_id, bos_token_id = EOS, BOS

        def __call__(self, texts: list[str], **options: Any) -> Any:
            seen.extend(texts)
            return inner(texts, **options)

    blocks([words(i % 90 + 2) for i in range(1000)], Counting(), block=8, tokens=16, seed=0)
    assert len(seen) == tokens._BATCH


def test_text_blocks_is_the_text_as_it_is() -> None:
    text = words(*range(2, 25)).text  # 23 tokens
    assert text_blocks(text, tokenizer(**BOTH), seqlen=5).tolist() == torch.arange(2, 22).view(4, 5).tolist()
    assert text_blocks(text, tokenizer(**BOTH), seqlen=5, max_tokens=14).tolist() == [
        [2, 3, 4, 5, 6],
        [7, 8, 9, 10, 11],
    ]
    plain = tokenizer(**BOTH)(text)["input_ids"]
    assert plain[0] == BOS  # so the separator-free blocks above were asked for, not an accident


def test_too_little_text_says_how_much_came_and_how_much_is_needed() -> None:
    with pytest.raises(TextError) as caught:
        blocks([words(3, 4), words(5)], tokenizer(**BOTH), block=6, tokens=100, seed=0)
    assert (caught.value.came, caught.value.allowed) == ("the text gives 5 tokens", "at least 6, one block")
    with pytest.raises(TextError, match="gives 3 tokens"):
        text_blocks(words(3, 4, 5, 6).text, tokenizer(**BOTH), seqlen=4, max_tokens=3)
    with pytest.raises(TextError, match="gives 0 tokens"):
        blocks([], tokenizer(**BOTH), block=6, tokens=None, seed=0)


def test_vocabulary_must_fit_the_model() -> None:
    check_vocabulary(tokenizer(**BOTH), 100)
    with pytest.raises(BrokenModel) as caught:
        check_vocabulary(tokenizer(**BOTH), 99)
    assert caught.value.came == "a tokenizer that does not fit the model: it makes token id 99"
    assert caught.value.allowed == "ids below 99, the rows of the model's embedding"


def test_an_added_token_may_lie_outside_the_vocabulary_but_the_separator_may_not() -> None:
    with_image = tokenizer(**BOTH)
    with_image.add_special_tokens({"pad_token": "<image>"})  # id 100
    check_vocabulary(with_image, 100)
    outside = tokenizer(eos_token="<end>")  # id 100
    assert outside.eos_token_id == 100
    with pytest.raises(BrokenModel, match="token id 100"):
        check_vocabulary(outside, 100)
