"""The gateway's own API as an OpenAPI document: for tests only, as clients have the published ones.

Of the bodies it says what the gateway itself reads, and no more than it promises of the answers.
"""

from typing import Any

_REQUIRED_HEADERS = {"x-request-id": {"required": True, "schema": {"type": "string"}}}
_ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
_MESSAGES = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": ["user", "assistant", "system"]},
            "content": {"type": "string"},
        },
        "required": ["role", "content"],
    },
}
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
    ]
}
_COUNT = {"type": "integer", "minimum": 1, "maximum": 1_000_000}
_COMMON: dict[str, Any] = {
    "stream": {"type": "boolean"},
    "user": {"type": "string"},
    "metadata": {"type": "object", "properties": {"user_id": {"type": "string"}}},
    "max_tokens": _COUNT,
    "n": {"type": "integer", "minimum": 1, "maximum": 16},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
}
_FIELDS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": _MESSAGES, "max_completion_tokens": _COUNT},
    "/v1/completions": {"prompt": _PROMPT, "best_of": _COUNT},
    "/v1/responses": {"input": _PROMPT, "max_output_tokens": _COUNT, "store": {"const": False}},
    "/v1/messages": {"messages": _MESSAGES},
    "/v1/messages/count_tokens": {"messages": _MESSAGES},
    "/v1/embeddings": {"input": _PROMPT},
    "/tokenize": {"prompt": _PROMPT},
    "/v1/tokenize": {"prompt": _PROMPT},
    "/detokenize": {"tokens": {"type": "array", "items": {"type": "integer"}}},
    "/v1/detokenize": {"tokens": {"type": "array", "items": {"type": "integer"}}},
}


def document(models: list[str]) -> dict[str, Any]:
    """`models`: names that may be asked for."""
    paths: dict[str, Any] = {path: {"post": _post(path, models)} for path in _FIELDS}
    paths["/v1/models"] = {"get": _get("ModelList")}
    named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"] = {"get": {**_get("Model"), "parameters": [named]}}
    for path in ("/healthz", "/readyz"):
        paths[path] = {"get": _get("Health", identified=False)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Gateway", "version": "1"},
        "paths": paths,
        "components": {"schemas": _SCHEMAS},
    }


def _post(path: str, models: list[str]) -> dict[str, Any]:
    body = {
        "type": "object",
        "properties": {"model": {"enum": [*models, "unknown"]}, **_COMMON, **_FIELDS[path]},
        "required": ["model"],
    }
    error = "AnthropicError" if path in _ANTHROPIC else "OpenAiError"
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {
                "description": "The rank's answer, or its events.",
                "headers": _REQUIRED_HEADERS,
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {"schema": {"type": "object", "required": ["data"]}},
                },
            },
            "4XX": _answer(error),
        },
    }


def _get(schema: str, identified: bool = True) -> dict[str, Any]:
    return {"responses": {"200": _answer(schema, identified), "4XX": _answer("OpenAiError")}}


def _answer(schema: str, identified: bool = True) -> dict[str, Any]:
    return {
        "description": schema,
        "headers": _REQUIRED_HEADERS if identified else {},
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }


def _exactly(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_MODEL = _exactly(
    id=_TEXT,
    object={"const": "model"},
    created={"type": "integer"},
    owned_by=_TEXT,
    root=_TEXT,
    max_model_len={"type": "integer"},
)
_SCHEMAS: dict[str, Any] = {
    "OpenAiError": _exactly(
        error=_exactly(
            message={"type": "string", "minLength": 1},
            type={"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
            param=_TEXT_OR_NULL,
            code=_TEXT_OR_NULL,
        )
    ),
    "AnthropicError": _exactly(
        type={"const": "error"},
        error=_exactly(
            type={
                "enum": [
                    "invalid_request_error",
                    "authentication_error",
                    "permission_error",
                    "not_found_error",
                    "request_too_large",
                    "rate_limit_error",
                ]
            },
            message={"type": "string", "minLength": 1},
        ),
        request_id={"type": "string", "minLength": 1},
    ),
    "Model": _MODEL,
    "ModelList": _exactly(object={"const": "list"}, data={"type": "array", "items": _MODEL}),
    "Health": {
        "type": "object",
        "properties": {"status": {"const": "ok"}, "missing": {"type": "array"}},
        "required": ["status"],
        "additionalProperties": False,
    },
}
