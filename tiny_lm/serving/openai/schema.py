"""Request and response bodies of OpenAI's API.

Fields that do not affect the response (``user``, ``metadata`` and so on) are ignored, as other servers do; unsupported
ones that would change it must be empty.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tiny_lm.serving.limits import MAX_N, MAX_PROMPT_CHARACTERS, MAX_SEQUENCES, MAX_TOP_LOGPROBS

PromptText = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
PromptIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
Prompt = (
    PromptText
    | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_SEQUENCES)]
    | PromptIds
    | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_SEQUENCES)]
)
StopString = Annotated[str, Field(min_length=1, max_length=256)]


_MAX_LIST_DEPTH = 2
"""Maximum nesting of lists of numbers (several prompts of token ids)."""


def _whole_numbers_as_integers(value: object, *, depth: int) -> object:
    if isinstance(value, list) and depth:
        return [_whole_numbers_as_integers(each, depth=depth - 1) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class StrictBody(BaseModel):
    """Strictly typed request body: ``"3"`` is not a number."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: object) -> object:
        """Treat null as absent: clients send it for fields that their user has not set."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    @field_validator("*", mode="before")
    @classmethod
    def _accept_whole_numbers(cls, value: object) -> object:
        """JSON has one kind of numbers: 1.0 is an integer, too, and some clients write it that way."""
        return _whole_numbers_as_integers(value, depth=_MAX_LIST_DEPTH)


class StreamOptions(StrictBody):
    """Options of a stream."""

    include_usage: bool | None = None


class ResponseFormat(StrictBody):
    """Format of the response; only text is supported."""

    type: Literal["text"]


class SampledRequest(StrictBody):
    """Fields of completion and chat requests.

    ``top_k``, ``min_p``, ``repetition_penalty`` and ``min_tokens`` are vLLM's additions to OpenAI's API.
    """

    model: str = Field(max_length=1024, description="a model id of /v1/models")
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=0, description="must be empty")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1 for all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)


class CompletionRequest(SampledRequest):
    """Completion request."""

    prompt: Prompt | None = Field(
        None, description="a text, token ids, or a list of either; empty to generate from scratch"
    )
    echo: bool | None = Field(None, description="return the prompt, too")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=1, description="must be 1")
    suffix: str | None = Field(None, max_length=0, description="must be empty")


class ContentPart(StrictBody):
    """A part of a message."""

    type: Literal["text"]
    text: PromptText


class ChatMessage(StrictBody):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: PromptText | Annotated[list[ContentPart], Field(max_length=1024)] | None = None


class ChatCompletionRequest(SampledRequest):
    """Chat request."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31, description="overrides max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="implies logprobs, if not false")
    modalities: list[Literal["text"]] | None = Field(None, max_length=16)
    tools: list[dict[str, Any]] | None = Field(None, max_length=1024, description="ignored: the model calls no tools")
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = Field(None, description="older name of tool_choice")


class Usage(BaseModel):
    """Number of tokens of prompt and completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion, token by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A completion of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionResponse(BaseModel):
    """Completion response."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    """A likely token at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A sampled token, with the likeliest alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a reply, token by token."""

    content: list[TokenLogprob]


class ResponseMessage(BaseModel):
    """A reply of the model."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """A reply, and why it ended."""

    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionResponse(BaseModel):
    """Chat response."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Error response."""

    error: ErrorDetail
