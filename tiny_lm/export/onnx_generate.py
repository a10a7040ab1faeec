"""Continue a text with an exported model: onnxruntime, numpy and tokenizers, and nothing else.

    pip install onnxruntime numpy tokenizers
    python generate.py --prompt "Once upon a time" --temperature 0.8 --top-k 40

This file is part of the export; copy what you need.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

Array = NDArray[Any]


class OnnxModel:
    """A model and its tokenizer out of an export.

    Shapes: B rows, P tokens read before (the past), T new tokens, S = P + T, V vocabulary.

    Attributes:
        tokenizer: begins each text as those of the training began.
        context: most tokens that the model sees at once.
        settings: the content of ``generation_config.json``.
    """

    def __init__(self, folder: Path, file: str = "onnx/model.onnx", threads: int = 0) -> None:
        """Load a file of the export in ``folder``; 0 threads are as many as there are cores."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        self.context: int = config["n_positions" if config["model_type"] == "gpt2" else "max_position_embeddings"]
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
        self._past = {node.name: node.shape for node in self.session.get_inputs() if node.name.startswith("past_")}

    def empty_past(self, rows: int = 1) -> list[Array]:
        """Return the keys and values of no tokens."""
        return [np.zeros((rows, heads, 0, size), np.float32) for _, heads, _, size in self._past.values()]

    def forward(self, input_ids: Array, attention_mask: Array, past: list[Array]) -> tuple[Array, list[Array]]:
        """Read ``input_ids`` [B, T] behind a past.

        Args:
            input_ids: token ids; anything where a row is padded.
            attention_mask: [B, S], 1 for a token and 0 for padding, of the past and of ``input_ids``.
            past: what the last call returned, or :meth:`empty_past`.

        Returns:
            logits [B, T, V], and the past of the next call.
        """
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, **dict(zip(self._past, past, strict=True))}
        logits, *present = self.session.run(None, feeds)
        return logits, present

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Continue ``ids``, a token at a time, until the text ends.

        A text longer than the context continues with a sliding context: its second half is prefilled again.

        Args:
            ids: at least one token; of those beyond the context the last ones are read.
            max_new_tokens: maximum tokens to generate.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: only the k likeliest tokens; 0 for all.
            top_p: only the likeliest tokens that have this probability together; 1 for all.
            seed: of the random numbers; None for others each time.
        """
        random = np.random.default_rng(seed)
        text = list(ids)
        unread, past, length = text[-self.context :], self.empty_past(), 0
        for _ in range(max_new_tokens):
            if length + len(unread) > self.context:
                unread, past, length = text[-((self.context + 1) // 2) :], self.empty_past(), 0
            length += len(unread)
            logits, past = self.forward(np.array([unread]), np.ones((1, length), np.int64), past)
            last = logits[0, -1].astype(np.float64)
            last[self.settings.get("suppress_tokens", [])] = -np.inf
            token = draw(last, temperature, top_k, top_p, random)
            if token == self.settings["eos_token_id"]:
                return
            yield token
            text.append(token)
            unread = [token]


def draw(logits: Array, temperature: float, top_k: int, top_p: float, random: np.random.Generator) -> int:
    """Draw a token from ``logits`` [V]; the other arguments as for :meth:`OnnxModel.stream`."""
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    probabilities = np.exp((logits[order] - logits[order[0]]) / temperature)
    probabilities /= probabilities.sum()
    probabilities[probabilities.cumsum() - probabilities >= top_p] = 0
    return int(random.choice(order, p=probabilities / probabilities.sum()))


def main() -> None:
    """Write the prompt and its continuation to standard output."""
    folder = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Continue a text with the model in this folder.")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--file", default="onnx/model.onnx", help="or onnx/model_quantized.onnx: a quarter of the size")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=40, help="0 for all tokens")
    parser.add_argument("--top-p", type=float, default=0.95, help="1 for all tokens")
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    if options.temperature < 0 or options.top_k < 0 or not 0 < options.top_p <= 1:
        parser.error("--temperature and --top-k must be 0 or more, and --top-p above 0 and at most 1")

    model = OnnxModel(folder, options.file)
    ids = model.tokenizer.encode(options.prompt).ids
    decoder = DecodeStream(skip_special_tokens=True)  # holds back a character until all its bytes are there
    for token in ids:
        print(decoder.step(model.tokenizer, token) or "", end="")
    drawing = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    for token in model.stream(ids, options.max_new_tokens, **drawing, seed=options.seed):
        print(decoder.step(model.tokenizer, token) or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
