"""Kinds of fields: what is accepted with its neutral value only, and shapes that OpenAI's clients send in two ways."""

from collections.abc import Callable
from json import dumps
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)
MAX_ID = 2**31 - 1  # of tokens: no vocabulary is larger

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$")]  # visible ASCII, as in a header
TokenId = Annotated[int, Field(ge=0, le=MAX_ID)]
Prompts = list[str] | list[list[int]]


def neutral(why: str, *values: object) -> Any:
    """A field that is known and not implemented: null, and those `values` that ask for nothing, are accepted."""

    def check(value: object) -> object:
        if value is None or any(type(value) is type(one) and value == one for one in values):
            return value
        accepted = f", or send {' or '.join(map(_show, values))}" if values else ""
        raise PydanticCustomError("not_implemented", f"{why}: leave it out{accepted}")

    return Annotated[Any, PlainValidator(check), WithJsonSchema({"enum": [None, *values], "description": why})]


class _OrText:
    """Tells the OpenAPI document of a list that may also be one text."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


def or_text(wrap: Callable[[str], Any]) -> tuple[BeforeValidator, _OrText]:
    """Annotations of a list for which a text is short: the list of `wrap(text)`."""

    def listed(value: object) -> object:
        if not isinstance(value, str | list):
            raise PydanticCustomError("text_or_list", "must be a text or a list")
        return [wrap(value)] if isinstance(value, str) else value

    return BeforeValidator(listed), _OrText()


def _prompts(value: object) -> Prompts:
    """A list of texts or a list of lists of ids, of any of the four shapes of a prompt."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_ids(value):
            return [value]
        if all(isinstance(one, str) for one in value) or all(isinstance(one, list) and _is_ids(one) for one in value):
            return value
    raise PydanticCustomError(
        "prompt", "must be a text, a list of texts, a list of token ids, or a list of lists of token ids, none empty"
    )


def _is_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(one) is int and 0 <= one <= MAX_ID for one in value)


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_ID}, "minItems": 1}
Prompt = Annotated[
    Any,
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]


def _logit_bias(value: object) -> object:
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must be an object of token ids and numbers from -100 to 100")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_ID):
            raise PydanticCustomError("logit_bias", f"key {key[:32]!r} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("logit_bias", f"the bias of token {key} must be a number from -100 to 100")
    if len({int(key) for key in value}) < len(value):
        raise PydanticCustomError("logit_bias", "a token id is there twice, spelled in two ways")
    return {int(key): float(bias) for key, bias in value.items()}


LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]


def _show(value: object) -> str:
    return dumps(value)
