"""Request bodies, as OpenAI's clients send them. A field that is not here is refused, never ignored.

Every field's range is checked here, so that errors name the field. Unions are told apart by functions whose tags begin with `<`: they are
left out of the names in errors.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from weft.engine.request import MAX_SEED

MAX_CHOICES = 128
MAX_PROMPTS = 256
MAX_TOOLS = 128


class Body(BaseModel):
    """Strict: a number is no text, a field that is not declared is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _by_shape(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else "<object>" if isinstance(value, dict) else None


def _shaped(*shapes: str) -> Discriminator:
    names = {"<text>": "a text", "<list>": "a list", "<object>": "an object"}
    allowed = " or ".join(names[shape] for shape in shapes)
    return Discriminator(_by_shape, custom_error_type="shape", custom_error_message=f"Input should be {allowed}")


# Conversations.


class TextPart(Body):
    """A part of a message; text is the only kind that there is."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Annotated[list[TextPart], Field(min_length=1)], Tag("<list>")], _shaped("<text>", "<list>")
]


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Body):
    role: Literal["user"]
    content: Content


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Body):
    """An answer given before. The fields that are always null are those in which an answer of another server may come back."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


def _role(value: Any) -> str | None:
    roles = {"system": "<system>", "developer": "<system>", "user": "<user>", "assistant": "<assistant>", "tool": "<tool>"}
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return roles.get(role) if isinstance(role, str) else None


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(
        _role,
        custom_error_type="role",
        custom_error_message="Input should be an object whose role is system, developer, user, assistant or tool",
    ),
]
Messages = Annotated[list[Message], Field(min_length=1)]


# The form of answers.


class PlainFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {"type": "object"}
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


def _format(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("text", "json_object", "json_schema") else None


ResponseFormat = Annotated[
    Annotated[PlainFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(
        _format, custom_error_type="format", custom_error_message="Input should be an object whose type is text, json_object or json_schema"
    ),
]


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[NamedTool, Tag("<object>")], _shaped("<text>", "<object>")
]


# Requests.


class StreamOptions(Body):
    include_usage: bool = False


Stop = Annotated[
    Annotated[Annotated[str, Field(min_length=1)], Tag("<text>")]
    | Annotated[Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)], Tag("<list>")],
    _shaped("<text>", "<list>"),
]


TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Sampling(Body):
    """What both kinds of completion take. None is as if it were not there."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stop | None = None


class ChatRequest(Sampling):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1)]


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    return "<ids>" if isinstance(first, int) else "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else None


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Ids, Tag("<ids>")]
    | Annotated[Annotated[list[str], Field(max_length=MAX_PROMPTS)], Tag("<texts>")]
    | Annotated[Annotated[list[Ids], Field(max_length=MAX_PROMPTS)], Tag("<lists>")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt",
        custom_error_message="Input should be a text, a list of texts, a list of token ids or a list of such lists",
    ),
]


class CompletionRequest(Sampling):
    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class EmbeddingRequest(Body):
    model: str
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None


class TokenizeRequest(Body):
    """Either a text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Id]
