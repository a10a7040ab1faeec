"""The handler that TorchServe calls: JSON in, JSON out.

This file travels inside the archive that ``tiny-lm export torchserve`` writes, and runs where TorchServe and tiny-lm
are installed. TorchServe wants just one class here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tiny_lm import TextGenerator
from tiny_lm.errors import UserError
from tiny_lm.inference.request import GenerationConfig
from tiny_lm.inference.sampling import SamplingParams

MAX_PROMPT_CHARS = 20_000
"""Maximum characters of a prompt."""
MAX_NEW_TOKENS = 2_048
"""Maximum tokens of a completion."""

_SAMPLING = {field.name for field in fields(SamplingParams)}
_KINDS: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,),
    "max_new_tokens": (int,),
    "min_new_tokens": (int,),
    "seed": (int, type(None)),
    "stop": (list,),
    "logprobs": (bool,),
    "top_k": (int, type(None)),
    **dict.fromkeys(_SAMPLING - {"top_k"}, (int, float)),
}


class TinyLMHandler:
    """Loads the model once and completes the prompt of each request."""

    def initialize(self, context: Any) -> None:
        """Load the model.

        Args:
            context: TorchServe's; ``system_properties`` names the folder of the archive and the GPU, if any.
        """
        properties = context.system_properties
        gpu = properties.get("gpu_id")
        device = "cpu" if gpu in (None, "") else f"cuda:{gpu}"
        self._generator = TextGenerator.from_export(Path(properties["model_dir"]), device=device)

    def handle(self, data: Sequence[Mapping[str, Any]], context: Any) -> list[dict[str, Any]]:
        """Handle each request of a batch; an invalid one gets status 400 and the reason.

        Args:
            data: for each request what it sent, under ``body`` or ``data``.
            context: TorchServe's.
        """
        answers = []
        for index, row in enumerate(data):
            try:
                answers.append(self._answer(row.get("body", row.get("data"))))
            except UserError as error:
                context.set_response_status(code=400, phrase="Bad Request", idx=index)
                answers.append({"error": str(error)})
        return answers

    def _answer(self, content: Any) -> dict[str, Any]:
        values = check_content(content)
        request = GenerationConfig(
            max_new_tokens=values.get("max_new_tokens", 200),
            min_new_tokens=values.get("min_new_tokens", 0),
            stop=tuple(values.get("stop", ())),
            **{name: values[name] for name in values.keys() & _SAMPLING},
            logprobs=0 if values.get("logprobs") else None,
        )
        (made,) = self._generator.generate_batch([values["prompt"]], request, seed=values.get("seed"))
        answer = {"text": made.prompt + made.text, "tokens": len(made.ids), "finish_reason": made.finish_reason}
        if request.logprobs is not None:
            answer["logprobs"] = [drawn.logprob for drawn in made.logprobs]
        return answer


def check_content(content: Any) -> dict[str, Any]:
    """Validate a request.

    Raises:
        UserError: it is not a JSON object, a field is unknown or of the wrong type, or a value is too large.
    """
    if not isinstance(content, dict):
        raise UserError('send a JSON object such as {"prompt": "Once upon a time"}, as application/json')
    for name, value in content.items():
        if name not in _KINDS:
            raise UserError(f"unknown field {str(name)[:40]!r}; the fields are: {', '.join(sorted(_KINDS))}")
        kinds = _KINDS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{name} has the wrong type ({type(value).__name__})")
    if "prompt" not in content:
        raise UserError("the field 'prompt' is missing")
    if len(content["prompt"]) > MAX_PROMPT_CHARS:
        raise UserError(f"prompt may have at most {MAX_PROMPT_CHARS:,} characters (it has {len(content['prompt']):,})")
    if content.get("max_new_tokens", 0) > MAX_NEW_TOKENS:
        raise UserError(f"max_new_tokens may be at most {MAX_NEW_TOKENS:,} (it is {content['max_new_tokens']:,})")
    if not 0 <= (content.get("seed") or 0) < 2**63:
        raise UserError("seed must be 0 or more, and below 2 to the power of 63")
    if not all(isinstance(text, str) for text in content.get("stop", [])):
        raise UserError("stop must be a list of strings")
    return content
