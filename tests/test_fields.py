"""The table of the job file's fields, and that everything else agrees with it."""

import re

import pytest
from pydantic import TypeAdapter

from harness import REPOSITORY
from promptdrop import config
from promptdrop.fields import FIELDS, IMAGE_FIELDS, OPTIONS, type_of
from promptdrop.nouns import ImageSpec
from promptdrop.records import SidecarRequest

TYPED = [name for name in FIELDS if name != "images"]  # whose type is made by the JSON Schema alone


@pytest.mark.parametrize("name", TYPED)
def test_a_field_takes_its_own_examples(name: str) -> None:
    """It also takes its default, if it has one, so that no value in the schema is refused."""
    field = FIELDS[name]
    values = [*field.examples, *([] if field.default is None else [field.default])]

    for value in values:
        assert TypeAdapter(type_of(name)).validate_python(value, strict=True) == value


def test_every_attribute_of_an_image_is_a_field() -> None:
    """Each has a field of the same name, except its number, since `parse` fills them in by name."""
    assert set(ImageSpec._fields) - {"image"} <= set(IMAGE_FIELDS)


def test_the_sidecar_says_all_that_was_asked() -> None:
    """It has each attribute of an image, except those in other parts of the sidecar or in none."""
    elsewhere = {"image", "format", "timeout_seconds"}

    assert set(SidecarRequest.model_fields) == set(ImageSpec._fields) - elsewhere


def test_defaults_and_presets_give_the_configured_fields() -> None:
    """A preset also gives what the configuration keeps in other sections, and `size`."""
    configured = {name for name, field in FIELDS.items() if field.configured}

    assert set(config.Defaults.model_fields) == configured
    assert set(config.Folder.model_fields) == configured | {"size", "format", "timeout_seconds"}


def test_every_field_is_in_the_readme() -> None:
    """The table of fields has a row for each, except the lists of prompts and of images."""
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (REPOSITORY / "README.md").read_text(), re.M)
    named = {name for row in rows for name in re.findall(r"\w+", row)}

    assert set(FIELDS) - {"prompts", "images"} <= named


def test_an_option_is_of_an_image_and_of_one_value() -> None:
    """Each option is of a type to which the command line converts: text, an integer or a number."""
    assert set(OPTIONS) <= set(IMAGE_FIELDS)
    assert {field.kind for field in OPTIONS.values()} <= {str, int, float}
