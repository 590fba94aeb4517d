"""Text vectors of recent histories and wishes: what was asked a moment ago is asked again."""

from __future__ import annotations

from collections import OrderedDict

from fusionrec.data.histories import FloatArray, Histories

Key = tuple[str, bytes, str | None]


class VectorCache:
    """The vectors that were used last. Lives in one event loop."""

    def __init__(self, size: int) -> None:
        """Keep up to ``size`` vectors; 0 keeps none."""
        self._size = size
        self._vectors: OrderedDict[Key, FloatArray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._vectors)

    @staticmethod
    def keys(bundle: str, histories: Histories) -> list[Key | None]:
        """[B] what the vectors of ``histories`` are made from: the model, the items, the text.

        None where there is neither item nor text: that costs nothing, and shows that the embedder
        is alive.
        """
        texts = histories.texts or (None,) * len(histories)
        items = [histories.row(row).tobytes() for row in range(len(histories))]
        return [
            (bundle, row, text) if row or text else None
            for row, text in zip(items, texts, strict=True)
        ]

    def get(self, key: Key | None) -> FloatArray | None:
        """The vector; None where it is not known."""
        vector = self._vectors.get(key) if key is not None else None
        if key is not None and vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: Key | None, vector: FloatArray) -> None:
        """Remember ``vector``, and forget the one that was not used for longest."""
        if key is None:
            return
        self._vectors[key] = vector
        if len(self._vectors) > self._size:
            self._vectors.popitem(last=False)
