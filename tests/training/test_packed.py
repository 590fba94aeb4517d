import pytest
import torch

from fusionrec.language.encoder import Encoder, vectors
from fusionrec.language.tokens import tokenize
from fusionrec.training import packed

TEXTS = ["love", "the love and the war in space", "", "night music", "book of the night", "film"]


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    return Encoder.load(tiny_encoder, device="cpu")


@pytest.fixture(scope="module")
def rows(encoder):
    return tokenize(encoder.tokenizer, 32, TEXTS)


def test_texts_fill_rows_and_none_is_lost(rows):
    texts = [{"input_ids": [10 * n + i for i in range(n)]} for n in (3, 7, 4, 5, 2)]
    found = packed.pack(texts, padding=99)
    assert found["input_ids"].shape == (3, 7)  # 7; 5 and 2; 4 and 3
    for index, text in enumerate(texts):
        own = found["text"] == index
        assert found["input_ids"][own].tolist() == text["input_ids"]
        assert found["position_ids"][own].tolist() == list(range(len(text["input_ids"])))
    assert packed.pack(texts[:3], padding=99)["attention_mask"].sum() == 14
    again = packed.pack([texts[1], texts[2]], padding=99)
    assert again["input_ids"][1, 4:].tolist() == [99, 99, 99]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_and_gradients_are_those_of_padded_texts(encoder, rows, pooling):
    model = encoder.model.eval()
    assert packed.packs(model)
    found = []
    for inputs in (packed.pack(rows, 0), encoder.inputs(TEXTS)):
        model.zero_grad()
        if "text" in inputs:
            answer = packed.vectors(model, inputs, pooling, len(TEXTS))
        else:
            answer = vectors(model, inputs, pooling)
        (answer[:, :5] ** 3).sum().backward()
        grad = torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])
        found.append((answer.detach(), grad))
    model.zero_grad()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
