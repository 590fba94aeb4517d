"""Raw text as a stream of UTF-8 that is valid, whatever the file holds, and its lines."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from fusionrec.data.readers.protocol import BROKEN
from fusionrec.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Buffer


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return BROKEN, error.end


codecs.register_error("fusionrec-mark", _mark)


class TextStream(io.RawIOBase):
    """A file's bytes, decompressed and re-encoded as valid UTF-8 with ``BROKEN`` for broken bytes.

    A parser downstream therefore never meets invalid text, and finds broken rows by the mark. Costs
    one decode and encode of each block.

    Raises:
        DataError: the file cannot be read, is empty or is not what its suffix says.
    """

    def __init__(self, path: Path, encoding: str = "utf-8") -> None:
        super().__init__()
        self.path = path
        try:
            self._size = path.stat().st_size
            self._raw = path.open("rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        if self._size == 0:
            self._raw.close()
            raise DataError(f"{path} is empty: check that it was downloaded whole")
        packed = path.suffix == ".gz"
        self._file = cast("BinaryIO", gzip.GzipFile(fileobj=self._raw)) if packed else self._raw
        name = "utf-8-sig" if encoding == "utf-8" else encoding
        self._decoder = codecs.getincrementaldecoder(name)(errors="fusionrec-mark")
        self._rest = b""
        self.tail = b""
        """The last bytes read."""

    def readable(self) -> bool:
        """True."""
        return True

    @property
    def progress(self) -> float:
        """Share of the file that has been read."""
        return 1.0 if self._raw.closed else self._raw.tell() / self._size

    def _block(self, size: int) -> bytes:
        """The next block as UTF-8; empty at the end of the file."""
        while True:
            try:
                block = self._file.read(size)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{self.path} cannot be read to its end: {error}") from error
            text = self._decoder.decode(block, final=not block)
            if text or not block:
                return text.encode()

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill some of ``buffer``; 0 at the end of the file."""
        view = memoryview(buffer).cast("B")
        data = self._rest or self._block(len(view))
        given, self._rest = data[: len(view)], data[len(view) :]
        view[: len(given)] = given
        self.tail = (self.tail + given[-16:])[-16:]
        return len(given)

    def close(self) -> None:
        """Close the file."""
        self._raw.close()
        super().close()


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str, float]]:
    """Number, text and progress of each line of ``path`` that is not blank, without its end.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    stream = TextStream(path, encoding)
    with io.BufferedReader(stream, 1 << 18) as buffered:
        for number, line in enumerate(buffered, start=1):
            if text := line.decode().strip("\r\n"):
                yield number, text, stream.progress
