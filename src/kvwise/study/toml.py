"""Writes a plan back as TOML."""

import json
from typing import Any

from kvwise.study.plan import Plan

_TABLES = ("slo", "quality", "onoff", "engine", "links", "workload", "load")


def to_toml(plan: Plan) -> str:
    """The plan as TOML that `read_plan_text` reads back to an equal plan."""
    data = plan.model_dump(mode="json", exclude_none=True)
    blocks, loading = data.pop("block"), data.pop("loading")
    lines = _table(data, "")
    for block in blocks:
        lines += ["", "[[block]]", *_table(block, "block")]
    for table in loading:
        lines += ["", "[[loading]]", *_table(table, "loading")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _table(data: dict[str, Any], path: str) -> list[str]:
    plain = {k: v for k, v in data.items() if not (isinstance(v, dict) and k in _TABLES)}
    lines = [f"{_key(k)} = {_value(v)}" for k, v in plain.items() if v != {}]
    for key, value in data.items():
        if key in plain or not value:
            continue
        name = f"{path}.{key}" if path else key
        lines += ["", f"[{name}]", *_table(value, name)]
    return lines


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    # JSON's strings, numbers and booleans are TOML's too.
    return json.dumps(value, ensure_ascii=False)
