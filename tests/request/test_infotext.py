"""A1111's infotext, written and read."""

import pytest

from promptdrop.request.infotext import (
    ParsedInfotext,
    format_infotext,
    parse_infotext,
    parse_settings,
)

FIELDS = {"Steps": 9, "Sampler": "Euler", "CFG scale": 0.0, "Seed": 7, "Size": "1024x1024"}


def test_an_infotext_is_prompt_negative_prompt_and_one_line_of_settings():
    """The text is the one that A1111 writes under a picture."""
    text = format_infotext("a cat", "blurry", {**FIELDS, "Model": "Z-Image"})

    assert text == (
        "a cat\n"
        "Negative prompt: blurry\n"
        "Steps: 9, Sampler: Euler, CFG scale: 0.0, Seed: 7, Size: 1024x1024, Model: Z-Image"
    )


def test_what_is_none_is_left_out():
    """Without a negative prompt there is no line for it; a setting of None is not written."""
    assert format_infotext("a", None, {"Steps": 9, "Model": None}) == "a\nSteps: 9"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a b", "a b"),
        ("a, b", '"a, b"'),
        ("a: b", '"a: b"'),
        ("a\nb", '"a\\nb"'),
        ('a, "b" \\', '"a, \\"b\\" \\\\"'),
        ("猫, 犬", '"猫, 犬"'),
        ('say "a"', 'say "a"'),
    ],
)
def test_a_value_with_comma_colon_or_line_break_is_quoted_as_json(value, written):
    """It is quoted as A1111 does, and is the same value when it is read again."""
    text = format_infotext("p", None, {**FIELDS, "Model": value})
    parsed = parse_infotext(text)

    assert text.endswith(f"Model: {written}")
    assert parsed is not None
    assert parsed.fields["Model"] == value


@pytest.mark.parametrize(
    ("prompt", "negative_prompt"),
    [
        ("a cat", None),
        ("a cat", "blurry"),
        ("two\nlines\n\nand a gap", "also\ntwo"),
        ("Steps: 9, Sampler: Euler, Seed: 1\nis in the prompt", None),
        ('a "quote", a: colon', "b, c: d"),
        ("猫 😀", "é"),
    ],
)
def test_prompts_survive_the_round_trip(prompt, negative_prompt):
    """A line of the prompt that looks like settings stays in the prompt: the last line has those."""
    parsed = parse_infotext(format_infotext(prompt, negative_prompt, FIELDS))
    fields = {key: str(value) for key, value in FIELDS.items()}

    assert parsed == ParsedInfotext(prompt, negative_prompt, fields)


def test_what_a1111_loses_is_lost():
    """Blanks around lines are lost, and `Negative prompt:` inside the prompt begins the negative one."""
    parsed = parse_infotext(format_infotext(" a \nNegative prompt: b", "c", FIELDS))

    assert parsed is not None
    assert (parsed.prompt, parsed.negative_prompt) == ("a", "b\nc")


@pytest.mark.parametrize(
    ("text", "is_infotext"),
    [
        ("a\nSteps: 9, Sampler: Euler", True),
        ("a\nSteps: 9, Seed: 1, Model: x", True),
        ("a\nSteps: 9", False),
        ("a cat, style: oil, mood: calm", False),
        ("a cat", False),
        ("", False),
    ],
)
def test_the_last_line_decides(text, is_infotext):
    """A text is an infotext if its last line has `Steps` and `Sampler`, or three settings."""
    assert (parse_infotext(text) is not None) == is_infotext


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("Steps: 20, Sampler: Euler a", {"Steps": "20", "Sampler": "Euler a"}),
        ("Steps: 20,Seed: 1,", {"Steps": "20", "Seed": "1"}),
        ('Hashes: {"a": "b", "c": "d"}, Seed: 1', {"Hashes": '{"a": "b"', "Seed": "1"}),
        ('Lora hashes: "a: 1, b: 2", Version: v1.10.1', {"Lora hashes": "a: 1, b: 2", "Version": "v1.10.1"}),
        ('Model: "a, Seed: 1', {"Model": '"a', "Seed": "1"}),
        ("Face restoration: , Seed: 1", {"Face restoration": "", "Seed": "1"}),
        ("Seed: 1, Seed: 2", {"Seed": "2"}),
        ("A: 1, Size-1: 5", {"Size-1": "5"}),
    ],
)  # fmt: skip
def test_settings_are_read_as_a1111_reads_them(line, settings):
    """A key has two characters or more; a value ends at a comma or is in quotes."""
    assert parse_settings(line) == settings


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", ["a", " -/", "aa: 1,", 'aa: "', 'aa: "\\",', "a:", '"', "\\"])
def test_reading_does_not_take_quadratic_time(unit):
    """Half a megabyte of any unit is read within the time limit; A1111's expression takes hours."""
    parsed = parse_infotext("a\n" + unit * (500_000 // len(unit)))

    assert parsed is None or parsed.fields
