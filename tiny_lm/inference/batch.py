"""Texts that are continued together."""

from tiny_lm.inference.decoding import BatchDecoder
from tiny_lm.inference.request import GrowingText


class TextBatch:
    """Texts that are continued together, and may join and leave between steps."""

    def __init__(self, decoder: BatchDecoder) -> None:
        """Have room for as many texts as ``decoder`` has rows."""
        self._decoder = decoder
        self._texts: dict[int, GrowingText] = {}  # by row

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def free(self) -> int:
        """Number of texts that can join."""
        return self._decoder.free

    def join(self, text: GrowingText) -> None:
        """Take a text in that has not ended.

        Raises:
            IndexError: there is no room.
        """
        self._texts[self._decoder.join(text.wanted)] = text

    def leave(self, text: GrowingText) -> None:
        """Give up a text that has not ended.

        Raises:
            ValueError: it is not here.
        """
        rows, texts = list(self._texts), list(self._texts.values())
        self._finish(rows[texts.index(text)])

    def step(self) -> list[tuple[GrowingText, str]]:
        """Add a token to each text, but for those whose prompt is still to be read; who ends by it leaves.

        Returns:
            the texts that have a token more, each with what is now certain to follow, perhaps nothing.
        """
        told = []
        for drawn in self._decoder.step():
            text = self._texts[drawn.row]
            told.append((text, text.take(drawn)))
            if text.finish_reason is not None:
                self._finish(drawn.row)
        return told

    def _finish(self, row: int) -> None:
        self._decoder.finish(row)
        del self._texts[row]
