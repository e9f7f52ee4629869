"""The JSON schema of `config.yaml`, for editors and the documentation; `make docs` writes it."""

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from mtpforge.rules.config import Config


def json_schema() -> str:
    """The JSON schema of `config.yaml`, for editors."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(schema_generator=_Schema),
        "title": "config.yaml of mtpforge",
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


class _Schema(GenerateJsonSchema):
    """The schema without pydantic's extras: titles, and null for keys that are left out."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        value = schema.get("default")
        if value is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        made = super().dict_schema(schema)
        return {**made, "additionalProperties": False} if "patternProperties" in made else made
