"""What requests to the API of Ollama hold, and what its answers do."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from tiny_lm.serving.limits import PROMPT_CHARACTERS
from tiny_lm.serving.openai.schema import StopString, Strict

_Text = Annotated[str, Field(max_length=PROMPT_CHARACTERS)]
_Name = Annotated[str, Field(max_length=1024)]


def _admit_nulls(schema: dict[str, Any]) -> None:
    """Say in the schema of a body that each of its fields may be null."""
    for name, field in schema["properties"].items():
        kind = {key: value for key, value in field.items() if key not in ("title", "description", "default")}
        shown = {key: value for key, value in field.items() if key not in kind}
        schema["properties"][name] = {"anyOf": [kind, {"type": "null"}], **shown}


class OllamaOptions(Strict):
    """How to draw tokens; the defaults are Ollama's.

    Options of its engine alone (``num_ctx`` and so on) are passed over.
    """

    model_config = ConfigDict(json_schema_extra=_admit_nulls)

    num_predict: int = Field(-1, ge=-(2**31), lt=2**31, description="below 0: as many as the context holds")
    temperature: float = Field(0.8, ge=0, le=100)
    top_k: int = Field(40, ge=-(2**31), lt=2**31, description="0 or less for all tokens")
    top_p: float = Field(0.9, ge=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repeat_penalty: float = Field(1.1, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-100, le=100)
    frequency_penalty: float = Field(0.0, ge=-100, le=100)
    seed: int = Field(-1, description="below 0: another text each time")
    stop: list[StopString] = Field([], max_length=16)


class ModelRequest(Strict):
    """What every request names."""

    model: _Name = Field(validation_alias=AliasChoices("model", "name"))  # the older name that some clients send


class OllamaRequest(ModelRequest):
    """What both kinds of generation take."""

    stream: bool | None = None
    options: OllamaOptions | None = None
    format: Annotated[str, Field(max_length=0)] | Annotated[dict[str, Any], Field(max_length=0)] | None = Field(
        None, description="must be empty"
    )
    think: Literal[False] | None = None


class OllamaGenerateRequest(OllamaRequest):
    """A beginning that is gone on with."""

    prompt: _Text | None = None
    system: _Text | None = None
    raw: bool | None = Field(None, description="leave the chat template out")
    suffix: Annotated[str, Field(max_length=0)] | None = Field(None, description="must be empty")
    template: Annotated[str, Field(max_length=0)] | None = Field(None, description="must be empty")
    context: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="must be empty")
    images: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="must be empty")


class OllamaMessage(Strict):
    """A message of a chat."""

    role: Annotated[str, Field(max_length=64)]
    content: _Text | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="must be empty")


class OllamaChatRequest(OllamaRequest):
    """Messages that are answered."""

    messages: Annotated[list[OllamaMessage], Field(max_length=1024)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="must be empty")


class Details(BaseModel):
    """What kind of model it is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ListedModel(BaseModel):
    """A model that is served."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class ListedModels(BaseModel):
    """All models that are served."""

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
    """All models in memory, which are all that are served."""

    models: list[RunningModel]


class ModelInfo(BaseModel):
    """What there is to know about a model."""

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(BaseModel):
    """A version."""

    version: str


class Statistics(BaseModel):
    """What ends an answer; times in nanoseconds."""

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
    """A text that goes on from a prompt."""

    response: str


class OllamaResponseMessage(BaseModel):
    """An answer."""

    role: str
    content: str


class OllamaChatResponse(Statistics):
    """An answer to messages."""

    message: OllamaResponseMessage


class OllamaErrorResponse(BaseModel):
    """A request that was refused."""

    error: str
