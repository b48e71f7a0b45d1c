"""The JSON Schema of job files."""

import json

from promptdrop.request.schema import request_schema


def test_the_schema_names_every_field():
    """Each has a description, and no other field is allowed."""
    schema = request_schema()
    fields = schema["properties"]

    assert schema["additionalProperties"] is False
    assert [name for name in fields if not fields[name].get("description")] == []
    assert {"prompt", "prompts", "images", "priority", "meta", "size"} <= fields.keys()
    assert json.loads(json.dumps(schema)) == schema
