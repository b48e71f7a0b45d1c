"""The JSON Schema of job files, which editors check them with."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, create_model

from promptdrop.fields import FIELDS, IMAGE_FIELDS, type_of

_EXAMPLES = [
    {"prompt": "a cat on a sofa", "size": "16:9", "seed": 7},
    {"prompts": ["a cat", "a dog"], "count": 2},
    {"steps": 9, "images": [{"prompt": "a cat", "width": 768}, {"prompt": "a dog"}]},
]


def request_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a YAML or JSON job file, and of each line of JSONL."""
    types = {name: type_of(name) for name in FIELDS if name != "images"}
    image = create_model(
        "ImageFields",
        __config__=ConfigDict(extra="forbid", title="image"),
        __doc__="The fields of one image, as an entry of `images` may give them; null is not given.",
        **_properties({name: types[name] for name in IMAGE_FIELDS}),
    )
    types["images"] = Annotated[list[image], Field(min_length=1)]  # type: ignore[valid-type]  # made above
    any_of = [{"required": [name]} for name in ("prompt", "prompts", "images")]
    job = create_model(
        "JobFields",
        __config__=ConfigDict(
            extra="forbid",
            title="promptdrop job file",
            json_schema_extra={"anyOf": any_of, "examples": _EXAMPLES},  # type: ignore[dict-item]  # JSON
        ),
        __doc__="A job file: `prompt`, `prompts` or `images`; other fields at the top are for all images.",
        **_properties({name: types[name] for name in FIELDS}),
    )
    schema = job.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _properties(types: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, kind in types.items():
        field = FIELDS[name]
        described = Field(
            default=None,
            description=field.description or field.expected,
            examples=list(field.examples) or None,
        )
        properties[name] = (kind | None, described)
    return properties
