"""Texts read once each make the rows that the tokenizer makes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusionrec.language import tokens
from fusionrec.language.tokens import tokenize

WORDS = ["the", "night", "of", "year", "one", "and", "other", "day", "war", "love"]
TEMPLATES = {
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "t5": ("$A </s>", "$A $B </s>"),
    "none": ("$A", "$A $B"),
}


def tokenizer_with(template: str, side: str = "right") -> PreTrainedTokenizerFast:
    specials = ["[CLS]", "[SEP]", "<s>", "</s>", "[UNK]"]
    vocabulary = {word: code for code, word in enumerate([*specials, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = TEMPLATES[template]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, vocabulary[name]) for name in specials]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=specials,
        truncation_side=side,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def texts(generator: np.random.Generator, count: int) -> list[str]:
    """Of no words to fifteen; some are there several times."""
    found = [" ".join(generator.choice(WORDS, generator.integers(16))) for _ in range(count // 2)]
    return [found[index] for index in generator.integers(len(found), size=count)]


def by_transformers(tokenizer: Any, max_tokens: int, *columns: list[str]) -> list[dict]:
    found = tokenizer(*columns, truncation=True, max_length=max_tokens)
    return [{name: found[name][row] for name in found} for row in range(len(columns[0]))]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("max_tokens", [9, 10, 13, 100])
def test_rows_are_those_of_transformers(template: str, max_tokens: int):
    tokenizer = tokenizer_with(template)
    generator = np.random.default_rng(max_tokens)
    first, second = texts(generator, 60), texts(generator, 60)
    assert tokens._template(tokenizer, paired=True) is not None
    for columns in ([first], [first, second]):
        assert tokenize(tokenizer, max_tokens, *columns) == by_transformers(
            tokenizer, max_tokens, *columns
        )


def test_rows_of_a_real_tokenizer(tiny_encoder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    first = ["war " * 50, "a film of space", "", "love; love"]
    second = ["night " * 30, "the book " * 20, "music", ""]
    for columns in ([first], [first, second]):
        assert tokenize(tokenizer, 24, *columns) == by_transformers(tokenizer, 24, *columns)


def test_each_text_is_read_once(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenize(tokenizer, 24, ["x"], ["y"])
    read: list[str] = []
    plain = tokens._plain
    monkeypatch.setattr(
        tokens, "_plain", lambda tokenizer, texts: read.extend(texts) or plain(tokenizer, texts)
    )
    rows = tokenize(tokenizer, 24, ["war", "war", "love"], ["music", "love", "music"])
    assert len(rows) == 3
    assert sorted(read) == ["love", "music", "war"]


def test_what_cuts_otherwise_does_it_itself():
    tokenizer = tokenizer_with("bert", side="left")
    assert tokens._template(tokenizer, paired=False) is None
    given = [" ".join(WORDS)], ["war love"]
    assert tokenize(tokenizer, 8, *given) == by_transformers(tokenizer, 8, *given)


def test_nothing_makes_no_row(tiny_encoder: Path):
    assert tokenize(AutoTokenizer.from_pretrained(tiny_encoder), 24, []) == []
