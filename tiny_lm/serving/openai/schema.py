"""What requests to the API of OpenAI hold, and what its answers do.

Fields that this server has no use for (``user``, ``metadata`` and so on) are passed over, as other servers do; those
that would change the answer and cannot be honoured must be empty.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tiny_lm.serving.limits import MOST_CHOICES, MOST_LOGPROBS, MOST_PROMPTS, PROMPT_CHARACTERS

PromptText = Annotated[str, Field(max_length=PROMPT_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
PromptIds = Annotated[list[TokenId], Field(min_length=1, max_length=PROMPT_CHARACTERS)]
Prompt = (
    PromptText
    | Annotated[list[PromptText], Field(min_length=1, max_length=MOST_PROMPTS)]
    | PromptIds
    | Annotated[list[PromptIds], Field(min_length=1, max_length=MOST_PROMPTS)]
)
StopString = Annotated[str, Field(min_length=1, max_length=256)]


_DEEPEST_LIST = 2
"""Lists of numbers stand inside each other so often, at most (several prompts of token ids)."""


def _whole_numbers_as_integers(value: object, *, depth: int) -> object:
    if isinstance(value, list) and depth:
        return [_whole_numbers_as_integers(each, depth=depth - 1) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Strict(BaseModel):
    """A body whose types are taken by the letter: the string ``"3"`` is no number."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: object) -> object:
        """Treat a field that is null as absent: clients send null for what their user has not set."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    @field_validator("*", mode="before")
    @classmethod
    def _take_whole_numbers_as_integers(cls, value: object) -> object:
        """JSON knows one kind of numbers: 1.0 is an integer too, and some clients write it that way."""
        return _whole_numbers_as_integers(value, depth=_DEEPEST_LIST)


class StreamOptions(Strict):
    """How a text is streamed."""

    include_usage: bool | None = None


class ResponseFormat(Strict):
    """The form of an answer, which is text."""

    type: Literal["text"]


class SampledRequest(Strict):
    """What both kinds of completions take.

    ``top_k``, ``min_p``, ``repetition_penalty`` and ``min_tokens`` are what vLLM takes besides OpenAI's.
    """

    model: str = Field(max_length=1024, description="a name out of /v1/models")
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
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
    """A beginning that is gone on with."""

    prompt: Prompt | None = Field(
        None, description="a text, several, token ids, or several lists of these; nothing for a text from nothing"
    )
    echo: bool | None = Field(None, description="tell the prompt too")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=1, description="must be 1")
    suffix: str | None = Field(None, max_length=0, description="must be empty")


class ContentPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: PromptText


class ChatMessage(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: PromptText | Annotated[list[ContentPart], Field(max_length=1024)] | None = None


class ChatCompletionRequest(SampledRequest):
    """Messages that are answered."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31, description="goes before max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="implies logprobs, if not false")
    modalities: list[Literal["text"]] | None = Field(None, max_length=16)
    tools: list[dict[str, Any]] | None = Field(None, max_length=1024, description="read, and never called")
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = Field(None, description="an older name of tool_choice")


class Usage(BaseModel):
    """Tokens of a request and its answer."""

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
    """A text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionResponse(BaseModel):
    """Texts that go on from prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    """A token that could have stood in a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was drawn, with the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob]


class ResponseMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """An answer, and how it ended."""

    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionResponse(BaseModel):
    """Answers to messages."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """A request that was refused."""

    error: ErrorDetail
