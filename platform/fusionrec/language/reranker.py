"""The reranker: a cross-encoder that reads a history and a candidate together.

One transformer pass per pair, so it is for the few dozen candidates at the top of the fused list.
It sees what an encoder cannot, the words of the history beside those of the candidate, and pays for
it: nothing can be computed ahead. The pairs of a whole batch of histories are batched together.

Shape legend: B histories, C candidates of one history, P pairs, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fusionrec.config import Config
from fusionrec.data.histories import FloatArray
from fusionrec.language.graphs import FixedShapes, captured
from fusionrec.language.inference import (
    check_max_tokens,
    infer,
    pad,
    pick_device,
    usable,
    weights_dtype,
)
from fusionrec.language.layers import pack, quantise
from fusionrec.language.models import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_MODEL,
    fitting_max_tokens,
    load_pretrained,
    read_settings,
    resolve,
    save_pretrained,
)
from fusionrec.language.precision import Precision
from fusionrec.language.tokens import Row, tokenize


class RerankerConfig(Config):
    """What makes a model folder a reranker; ``reranker.json`` beside the weights."""

    model: str = DEFAULT_MODEL
    """Where the weights came from: package:NAME, a folder, or a name on the hub."""
    revision: str | None = None
    """Commit of a hub model."""
    max_tokens: int = Field(default=DEFAULT_MAX_TOKENS, ge=8)
    """Tokens that are read of a history and a candidate together, special tokens included."""
    history_items: int = Field(default=5, ge=1)
    """Newest items that make the text of a history."""


class Reranker:
    """A sequence classifier with one logit, on a device. Safe to call from several threads."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: RerankerConfig,
        device: torch.device | None = None,
        precision: Precision = Precision.AUTO,
    ) -> None:
        """Wrap a model loaded in ``precision``; it is moved to ``device`` (default: left there).

        Raises:
            ModelError: the model has fewer positions than ``config.max_tokens``.
        """
        check_max_tokens(model, config.max_tokens, config.model)
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.config = config
        self.precision = precision
        self._captured: FixedShapes | None = None
        # The first look at a tokenizer changes its settings, which raises while another thread
        # encodes.
        (self._shortest,) = tokenize(tokenizer, config.max_tokens, [""], [""])

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        precision: Precision = Precision.AUTO,
        frozen: bool = False,
        peaks: Sequence[float] = (),
    ) -> Self:
        """Load what :meth:`save` wrote, or start one from the weights of an encoder.

        A model without a head of one logit gets one, drawn from ``seed``: its scores mean nothing
        before it is trained. ``device`` is the GPU by default, where there is one. With
        ``precision`` bf16 on a device without instructions for it, fp32 is loaded, which is faster
        there; in bf16 a score depends a little on the batch that its pair is in.
        ``frozen`` models can be neither trained nor saved, and answer faster: on a GPU as CUDA
        graphs, which are captured now. In int8 they are faster where their ``peaks`` are known, as
        :func:`~.layers.quantise` says.

        Raises:
            ModelError: there is no such model, or it cannot be loaded.
        """
        folder = resolve(model, revision)
        config = read_settings(RerankerConfig, folder) or RerankerConfig(
            model=str(model), revision=revision, max_tokens=fitting_max_tokens(folder)
        )
        place = pick_device(device)
        precision = usable(precision, place, frozen=frozen)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # transformers draws a new head from the global generator
            classifier = load_pretrained(
                AutoModelForSequenceClassification.from_pretrained,
                folder,
                dtype=weights_dtype(precision),
                num_labels=1,
            )
        if precision is Precision.BF16:
            _keep_logit_whole(classifier)
        tokenizer = load_pretrained(AutoTokenizer.from_pretrained, folder)
        loaded = cls(classifier.eval(), tokenizer, config, place, precision)
        if precision is Precision.INT8:
            quantise(loaded.model, peaks)
        elif frozen:
            pack(loaded.model)
        if frozen:
            loaded._capture()
        return loaded

    @property
    def reads_lists(self) -> bool:
        """Whether a candidate's score depends on those beside it: never."""
        return False

    def inputs(
        self, histories: Sequence[str], candidates: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """[P, L] tensors on the CPU of P pairs, for ``model(**inputs).logits`` [P, 1]."""
        return pad(
            self.tokenizer,
            tokenize(self.tokenizer, self.config.max_tokens, histories, candidates),
        )

    def score(
        self,
        history_texts: Sequence[str],
        candidate_texts: Sequence[Sequence[str]],
        batch_size: int = 64,
    ) -> list[FloatArray]:
        """Logits of the candidates of each of B histories: B arrays [C], in their order.

        A blank history says nothing about any candidate: zeros.
        """
        assert len(history_texts) == len(candidate_texts)
        scores = [np.zeros(len(row), dtype=np.float32) for row in candidate_texts]
        asked = [index for index, text in enumerate(history_texts) if text.strip()]
        firsts = [history_texts[i] for i in asked for _ in candidate_texts[i]]
        seconds = [text for i in asked for text in candidate_texts[i]]
        if not firsts:
            return scores
        rows = tokenize(self.tokenizer, self.config.max_tokens, firsts, seconds)
        flat = self.run(rows, batch_size)
        start = 0
        for index in asked:
            stop = start + len(scores[index])
            scores[index] = flat[start:stop]
            start = stop
        return scores

    def run(self, rows: Sequence[Row], batch_size: int = 64) -> FloatArray:
        """[P] logits of one tokenised pair or more; what is captured has batches of its own."""
        if self._captured is not None:
            return self._captured(rows)
        return infer(self.model, self.tokenizer, rows, self._logits, batch_size, self.precision)

    def save(self, directory: Path) -> None:
        """Write a model folder (safetensors, tokenizer) and ``reranker.json``."""
        save_pretrained(self.model, self.tokenizer, directory, self.config)

    def _capture(self) -> None:
        self._captured = captured(
            self.model,
            self.tokenizer,
            self._logits,
            shape=(),
            shortest=self._shortest,
            max_tokens=self.config.max_tokens,
            precision=self.precision,
        )

    def _logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = self.model(**inputs).logits[:, 0]
        return logits


def _keep_logit_whole(model: torch.nn.Module) -> None:
    """Compute the last layer in float32: of a bf16 logit's 8 bits, close candidates would tie."""
    last = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1].float()
    last.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
