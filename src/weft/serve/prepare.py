"""From a request body to what the engine takes: prompt ids and sampling parameters."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weft.engine import Grammar, Request, SamplingParams
from weft.errors import UserError
from weft.serve import schema, tools
from weft.serve.errors import ApiError
from weft.serve.worker import Worker
from weft.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
OPENAI_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Prepared:
    """A request for the engine, and what is needed to write the answer. `calls`: the text may hold tool calls."""

    request: Request
    calls: bool = False


def chat(worker: Worker, body: schema.ChatRequest) -> Prepared:
    """Render and check a conversation. Raises ApiError."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are both given; they mean the same: leave one out.", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given, but logprobs is not true; set logprobs to true.", param="top_logprobs")
    offered, required, most = _tools(body)
    limits = body.max_completion_tokens or body.max_tokens
    params = _params(
        body,
        max_tokens=limits,
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
        grammar=_grammar(worker, body, offered, required, most),
    )
    prompt = render(worker.tokenizer, body.messages, offered)
    request = Request(check_length(worker, prompt, "messages"), params, adapter=worker.adapter_of(body.model))
    return Prepared(request, calls=bool(offered))


def completions(worker: Worker, body: schema.CompletionRequest) -> list[Prepared]:
    """Tokenise and check the prompts. Raises ApiError."""
    params = _params(
        body,
        max_tokens=body.max_tokens or DEFAULT_COMPLETION_TOKENS,
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
        grammar=None,
    )
    prompts = prompt_ids(worker, body.prompt, "prompt")
    adapter = worker.adapter_of(body.model)
    return [Prepared(Request(check_length(worker, ids, "prompt"), params, adapter=adapter)) for ids in prompts]


def _params(body: schema.Sampling, *, max_tokens: int | None, logprobs: bool, top_logprobs: int, grammar: Grammar | None) -> SamplingParams:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is given, but stream is not true; leave it out or stream.", param="stream_options")
    values: dict[str, Any] = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    values.setdefault("temperature", OPENAI_TEMPERATURE)
    if body.stop is not None:
        values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.logit_bias is not None:
        values["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, top_logprobs=top_logprobs, grammar=grammar, **values)


_SAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
)  # fmt: skip


# Prompts.


def prompt_ids(worker: Worker, given: Any, param: str) -> list[list[int]]:
    """Token ids of a prompt field: a text, ids, or a list of either."""
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    found = [worker.tokenizer.encode(each) if isinstance(each, str) else list(each) for each in given]
    for number, ids in enumerate(found):
        if not ids:
            raise ApiError(400, f"text {number} of {param} has no tokens; give at least one.", param=param)
        check_ids(worker, ids, param)
    return found


def check_ids(worker: Worker, ids: Sequence[int], param: str) -> None:
    """Raise ApiError for a token id that the model does not have."""
    vocab = worker.engine.model.spec.vocab
    foreign = next((token for token in ids if token >= vocab), None)
    if foreign is not None:
        raise ApiError(400, f"{param} has the token id {foreign}, but the model's ids go from 0 to {vocab - 1}.", param=param)


def check_length(worker: Worker, ids: Sequence[int], param: str, room: int = 1) -> Sequence[int]:
    """The ids, if `room` tokens more fit the context. Raises ApiError with both counts."""
    context = worker.engine.context
    if len(ids) + room > context:
        rest = ", which leaves no room for an answer" if len(ids) == context else ""
        message = f"the prompt has {len(ids)} tokens and the model's context is {context}{rest}; shorten the prompt."
        raise ApiError(400, message, "context_length_exceeded", param)
    return ids


def render(
    tokenizer: Tokenizer, messages: Sequence[Any], offered: Sequence[schema.Tool] = (), add_generation_prompt: bool = True
) -> list[int]:
    """A conversation as token ids."""
    takes_tools = _takes_tools(tokenizer)
    plain = [_message(message, takes_tools) for message in messages]
    try:
        if takes_tools or not offered:
            described = [tools.describe(tool) for tool in offered] if offered else None
            return tokenizer.apply_chat(plain, add_generation_prompt, tools=described)
        return _with_preamble(tokenizer, plain, tools.preamble(offered), add_generation_prompt)
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None


def _takes_tools(tokenizer: Tokenizer) -> bool:
    return "tool_use" in tokenizer.settings.chat_templates or bool(re.search(r"\btools\b", tokenizer.chat_template or ""))


def _with_preamble(tokenizer: Tokenizer, messages: list[dict[str, Any]], text: str, add_generation_prompt: bool) -> list[int]:
    if messages[0]["role"] == "system":
        first = {"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}
        return tokenizer.apply_chat([first, *messages[1:]], add_generation_prompt)
    try:
        return tokenizer.apply_chat([{"role": "system", "content": text}, *messages], add_generation_prompt)
    except UserError:  # a template without system messages: what it would say goes before the first words
        first = messages[0] | {"content": f"{text}\n\n{messages[0]['content']}"}
        return tokenizer.apply_chat([first, *messages[1:]], add_generation_prompt)


def _message(message: Any, takes_tools: bool) -> dict[str, Any]:
    """A message as chat templates expect it; where a template has no words for calls and their results, they become text."""
    role = "system" if message.role == "developer" else message.role
    content = _text(message.content)
    calls = getattr(message, "tool_calls", None)
    if role == "tool":
        if takes_tools:
            return {"role": "tool", "content": content, "tool_call_id": message.tool_call_id}
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if not calls:
        return {"role": role, "content": content}
    named = [(call, _arguments(call)) for call in calls]
    if takes_tools:
        functions = [(call.id, {"name": call.function.name, "arguments": arguments}) for call, arguments in named]
        entries = [{"id": number, "type": "function", "function": function} for number, function in functions]
        return {"role": role, "content": content, "tool_calls": entries}
    written = "\n".join(tools.write_call(call.function.name, arguments) for call, arguments in named)
    return {"role": role, "content": f"{content}\n{written}" if content else written}


def _arguments(call: schema.ToolCall) -> Any:
    try:
        return json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        message = f"the arguments of the call {call.id!r} are not JSON; give them as they were returned."
        raise ApiError(400, message, param="messages") from None


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


# Forms.


def _tools(body: schema.ChatRequest) -> tuple[Sequence[schema.Tool], bool, int]:
    """The tools that may be called, whether one must be, and how many calls there may be."""
    choice, offered = body.tool_choice, body.tools or []
    if not offered:
        if choice is not None and choice != "none":
            raise ApiError(400, "tool_choice is given, but no tools are; give tools or leave it out.", param="tool_choice")
        if body.parallel_tool_calls is not None:
            raise ApiError(400, "parallel_tool_calls is given, but no tools are; give tools or leave it out.", param="parallel_tool_calls")
        return (), False, 1
    names = [tool.function.name for tool in offered]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have the same name; give each a name of its own.", param="tools")
    most = tools.MAX_CALLS if body.parallel_tool_calls else 1
    if isinstance(choice, schema.NamedTool):
        chosen = [tool for tool in offered if tool.function.name == choice.function.name]
        if not chosen:
            raise ApiError(400, f"tool_choice names {choice.function.name!r}, but the tools are {', '.join(names)}.", param="tool_choice")
        return chosen, True, most
    return ((), False, 1) if choice == "none" else (offered, choice == "required", most)


def _grammar(worker: Worker, body: schema.ChatRequest, offered: Sequence[schema.Tool], required: bool, most: int) -> Grammar | None:
    """What the answer must match, compiled here so that an error names the field and the engine need not wait."""
    answer = _answer_form(body.response_format)
    assert worker.engine.grammars is not None
    try:
        if answer is not None:
            worker.engine.grammars.matcher(answer)
    except UserError as error:
        raise ApiError(400, str(error), "invalid_json_schema", "response_format") from None
    if not offered:
        return answer
    found = tools.grammar(offered, required, most, answer)
    try:
        worker.engine.grammars.matcher(found)
    except UserError as error:
        raise ApiError(400, f"the tools' parameters cannot be followed: {error}", "invalid_function_parameters", "tools") from None
    return found


def _answer_form(given: Any) -> Grammar | None:
    if isinstance(given, schema.JsonObjectFormat):
        return Grammar.json_schema({"type": "object"})
    if isinstance(given, schema.JsonSchemaFormat):
        return Grammar.json_schema(given.json_schema.schema_)
    return None
