"""Request and response bodies of Ollama's API."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from tiny_lm.serving.limits import MAX_PROMPT_CHARACTERS
from tiny_lm.serving.openai.schema import StopString, StrictBody

_Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
_Name = Annotated[str, Field(max_length=1024)]


def _make_nullable(schema: dict[str, Any]) -> None:
    """Declare each field of a body nullable in its schema."""
    for name, field in schema["properties"].items():
        kind = {key: value for key, value in field.items() if key not in ("title", "description", "default")}
        shown = {key: value for key, value in field.items() if key not in kind}
        schema["properties"][name] = {"anyOf": [kind, {"type": "null"}], **shown}


class OllamaOptions(StrictBody):
    """Sampling parameters; the defaults are Ollama's.

    Options of Ollama's own engine (``num_ctx`` and so on) are ignored.
    """

    model_config = ConfigDict(json_schema_extra=_make_nullable)

    num_predict: int = Field(-1, ge=-(2**31), lt=2**31, description="negative: as many as the context holds")
    temperature: float = Field(0.8, ge=0, le=100)
    top_k: int = Field(40, ge=-(2**31), lt=2**31, description="0 or less for all tokens")
    top_p: float = Field(0.9, ge=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repeat_penalty: float = Field(1.1, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-100, le=100)
    frequency_penalty: float = Field(0.0, ge=-100, le=100)
    seed: int = Field(-1, description="negative: a different text each time")
    stop: list[StopString] = Field([], max_length=16)


class ModelRequest(StrictBody):
    """A request that names a model."""

    model: _Name = Field(validation_alias=AliasChoices("model", "name"))  # the older name that some clients send


class OllamaRequest(ModelRequest):
    """Fields of generate and chat requests."""

    stream: bool | None = None
    options: OllamaOptions | None = None
    format: Annotated[str, Field(max_length=0)] | Annotated[dict[str, Any], Field(max_length=0)] | None = Field(
        None, description="must be empty"
    )
    think: Literal[False] | None = None


class OllamaGenerateRequest(OllamaRequest):
    """Completion request."""

    prompt: _Text | None = None
    system: _Text | None = None
    raw: bool | None = Field(None, description="do not apply the chat template")
    suffix: Annotated[str, Field(max_length=0)] | None = Field(None, description="must be empty")
    template: Annotated[str, Field(max_length=0)] | None = Field(None, description="must be empty")
    context: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="must be empty")
    images: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="must be empty")


class OllamaMessage(StrictBody):
    """A message of a chat."""

    role: Annotated[str, Field(max_length=64)]
    content: _Text | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="must be empty")


class OllamaChatRequest(OllamaRequest):
    """Chat request."""

    messages: Annotated[list[OllamaMessage], Field(max_length=1024)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="must be empty")


class Details(BaseModel):
    """Format and family of a model."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ListedModel(BaseModel):
    """A served model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class ListedModels(BaseModel):
    """The served models."""

    models: list[ListedModel]


class RunningModel(BaseModel):
    """A model in memory."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class RunningModelList(BaseModel):
    """The models in memory, which are all served ones."""

    models: list[RunningModel]


class ModelInfo(BaseModel):
    """Information about a model."""

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(BaseModel):
    """Version of the API."""

    version: str


class Statistics(BaseModel):
    """Fields of the last line of a response; durations are in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaGenerateResponse(Statistics):
    """Completion response."""

    response: str


class OllamaResponseMessage(BaseModel):
    """A reply of the model."""

    role: str
    content: str


class OllamaChatResponse(Statistics):
    """Chat response."""

    message: OllamaResponseMessage


class OllamaErrorResponse(BaseModel):
    """Error response."""

    error: str
