"""The losses without all logits are those with them, and so are the gradients."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
)

from fusionrec.training import vocabulary, weights
from fusionrec.training.config import LoraSettings, Method, TrainingConfig
from fusionrec.training.objectives.pretraining import PretrainingTask
from fusionrec.training.traced import LiveBytes
from fusionrec.training.vocabulary import UNPREDICTED, causal_loss, guesses

WORDS, ROWS, TOKENS = 40, 3, 8
SMALL = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MASKED = {
    "roberta": RobertaConfig(**SMALL),
    "distilbert": DistilBertConfig(vocab_size=WORDS, dim=16, hidden_dim=32, n_layers=2, n_heads=2),
    "modernbert": ModernBertConfig(
        **SMALL, cls_token_id=1, sep_token_id=2, attn_implementation="sdpa"
    ),
}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}
CAUSAL = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2),
    "gemma2": Gemma2Config(**SMALL | HEADS, final_logit_softcapping=2.0),
}


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, WORDS, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def made(kind, config) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind.from_config(config).eval()


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True))


def by_all_logits(model, given, labels) -> torch.Tensor:
    logits = model(**given).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=UNPREDICTED)


@pytest.mark.parametrize("name", MASKED)
def test_guessed_tokens_have_the_logits_of_all(name):
    model, given = made(AutoModelForMaskedLM, MASKED[name]), inputs()
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([1, 7, 3])
    few = guesses(model, given, (rows, columns)).logits
    assert few.shape == (1, 3, WORDS)
    every = model(**given).logits  # no hook is left behind
    torch.testing.assert_close(few[0], every[rows, columns])
    found, expected = (gradients(x.square().sum(), model) for x in (few, every[rows, columns]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("piece", [5 * WORDS, 10**9], ids=["pieces", "whole"])
@pytest.mark.parametrize("name", CAUSAL)
def test_pieces_have_the_loss_and_gradients_of_the_whole(name, piece, monkeypatch):
    monkeypatch.setattr(vocabulary, "_PIECE", piece)
    model, given = made(AutoModelForCausalLM, CAUSAL[name]), inputs()
    labels = given["input_ids"].clone()
    labels[0, :5] = UNPREDICTED
    loss, expected = causal_loss(model, given, labels), by_all_logits(model, given, labels)
    torch.testing.assert_close(loss, expected)
    pairs = zip(gradients(loss, model), gradients(expected, model), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert causal_loss(model, given, torch.full_like(labels, UNPREDICTED)).item() == 0.0


# peft reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_inside_of_adapters(monkeypatch):
    monkeypatch.setattr(vocabulary, "_PIECE", 5 * WORDS)
    config = TrainingConfig(method=Method.LORA, lora=LoraSettings(rank=2))
    for kind, chosen in ((AutoModelForCausalLM, "llama"), (AutoModelForMaskedLM, "roberta")):
        plain = made(kind, (CAUSAL | MASKED)[chosen])
        model, given = weights.with_adapters(plain, PretrainingTask, config), inputs()
        if chosen == "llama":
            loss = causal_loss(model, given, given["input_ids"])
            expected = by_all_logits(model, given, given["input_ids"])
        else:
            places = (torch.tensor([1]), torch.tensor([2]))
            loss = guesses(model, given, places).logits.sum()
            expected = model(**given).logits[1, 2].sum()
        torch.testing.assert_close(loss, expected)
        pairs = zip(gradients(loss, model), gradients(expected, model), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_pieces_take_less_memory(monkeypatch):
    config = LlamaConfig(**SMALL | {"vocab_size": 5_000})
    model, given = made(AutoModelForCausalLM, config), inputs()

    def peak(piece: int) -> int:
        monkeypatch.setattr(vocabulary, "_PIECE", piece)
        with LiveBytes(*model.parameters()) as live:
            torch.autograd.backward(causal_loss(model, given, given["input_ids"]))
        model.zero_grad()
        return live.peak

    logits = 4 * ROWS * TOKENS * 5_000
    assert peak(10**9) - peak(3 * 5_000) > 0.9 * logits
