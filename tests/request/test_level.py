"""The fields of one mapping: their meaning, and the words of their refusals."""

import pytest

from job_files import configured, image, refusal
from promptdrop.nouns import SCHEDULERS


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("prompt: yes", "prompt", "yes"),
        ("prompt: 2024-01-01", "prompt", "2024-01-01"),
        ("prompt: 12", "prompt", "12"),
        ("prompt: null", "prompt", "null"),
        ("prompt: 1:30", "prompt", "1:30"),
        ("prompt: |\n  a\n  b", "prompt", "a\nb"),
        ('prompt: "a\\tb"', "prompt", "a\tb"),
        ("negative_prompt: no", "negative_prompt", "no"),
        ("negative_prompt: null", "negative_prompt", None),
        ('negative_prompt: ""', "negative_prompt", ""),
        ("width: 64", "width", 64),
        ("width: 4096\nheight: 64", "width", 4096),
        ("width: 768.0", "width", 768),
        ("width: 0x300", "width", 768),
        ("width: null", "width", 1024),
        ("height: 512", "height", 512),
        ("steps: 1", "steps", 1),
        ("steps: 100", "steps", 100),
        ("guidance_scale: 0", "guidance_scale", 0.0),
        ("guidance_scale: 20", "guidance_scale", 20.0),
        ("guidance_scale: 1e0", "guidance_scale", 1.0),
        ("seed: 0", "seed", 0),
        ("seed: 010", "seed", 10),
        ("seed: 9223372036854775807", "seed", 2**63 - 1),
        ("seed: [5]", "seed", 5),
        ("scheduler: euler", "scheduler", "euler"),
        ("format: jpeg", "format", "jpeg"),
        ("format: avif", "format", "avif"),
        ("timeout_seconds: 0.5", "timeout_seconds", 0.5),
        ("timeout_seconds: 600", "timeout_seconds", 600.0),
        ("meta: {a: [1, null, yes, 1.5]}", "meta", {"a": [1, None, "yes", 1.5]}),
    ],
)
def test_a_field_means_what_the_contract_says(line, field, value):
    """Scalars are YAML 1.2 core, text fields are as written; null is not given, except in a prompt."""
    text = line if line.startswith("prompt:") else f"prompt: a\n{line}"

    assert getattr(image(text), field) == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("width: 100", "width=100 is not a multiple of 16 in [64, 4096]"),
        ("width: 48", "width=48 is not a multiple of 16 in [64, 4096]"),
        ("width: 4112", "width=4112 is not a multiple of 16 in [64, 4096]"),
        ("width: true", "width=true is not a multiple of 16 in [64, 4096]"),
        ("width: 9.5", "width=9.5 is not a multiple of 16 in [64, 4096]"),
        ("width: wide", "width='wide' is not a multiple of 16 in [64, 4096]"),
        ('width: "768"', "width='768' is text; write a multiple of 16 in [64, 4096], without quotes"),
        ("height: [768]", "height=[...] is not a multiple of 16 in [64, 4096]"),
        ("steps: 0", "steps=0 is not an integer in [1, 100]"),
        ("steps: 101", "steps=101 is not an integer in [1, 100]"),
        ("guidance_scale: -1", "guidance_scale=-1 is not a number in [0, 20]"),
        ("guidance_scale: 20.1", "guidance_scale=20.1 is not a number in [0, 20]"),
        ("guidance_scale: .nan", "guidance_scale=.nan is not a number in [0, 20]"),
        ("seed: -1", "seed=-1 is not an integer in [0, 2**63-1] or a list of them"),
        ("seed: 9223372036854775808", "seed=9223372036854775808 is not an integer in [0, 2**63-1] or a list of them"),
        ("seed: [1, x]", "seed[1]='x' is not an integer in [0, 2**63-1] or a list of them"),
        ("seed: []", "seed=[] is not an integer in [0, 2**63-1] or a list of them"),
        ("count: 0", "count=0 is not an integer of at least 1"),
        ("scheduler: heum", "scheduler='heum' is not one of euler, dpmpp_2m, dpmpp_2m_sde, unipc, heun; did you mean 'heun'?"),
        ("format: jpg", "format='jpg' is not one of png, jpeg, webp, avif; did you mean 'jpeg'?"),
        ("timeout_seconds: 0", "timeout_seconds=0 is not a number of seconds above 0, at most limits.timeout_seconds"),
        ("timeout_seconds: .inf", "timeout_seconds=.inf is not a number of seconds above 0, at most limits.timeout_seconds"),
        ("timeout_seconds: 86400", "timeout_seconds=86400 is not a number of seconds above 0, at most 600 (limits.timeout_seconds)"),
        ("meta: x", "meta='x' is not a mapping of at most 16 KiB as JSON"),
        ("meta: {a: .inf}", "meta={...} contains a number that is not finite"),
        (f"meta: {{a: {'x' * 16384}}}", "meta={...} takes 16393 bytes as JSON; expected at most 16384"),
        ("priority: 101", "priority=101 is not an integer in [-100, 100]"),
        ("priority: -101", "priority=-101 is not an integer in [-100, 100]"),
        ("size: 100x100", "size='100x100' is not WxH such as 1024x768 (multiples of 16 in [64, 4096]) or an aspect ratio such as 16:9"),
        ("size: big", "size='big' is not WxH such as 1024x768 (multiples of 16 in [64, 4096]) or an aspect ratio such as 16:9"),
        ("size: 0:1", "size='0:1' is not WxH such as 1024x768 (multiples of 16 in [64, 4096]) or an aspect ratio such as 16:9"),
        ("size: 100:1", "size='100:1' is not WxH such as 1024x768 (multiples of 16 in [64, 4096]) or an aspect ratio such as 16:9 (it would be 10240x96)"),
        ("promt: b", "unknown field 'promt'; did you mean 'prompt'?"),
        ("images: x", "images='x' is not a list of mappings such as {prompt: a cat}"),
        ("images: [x]", "images[0]='x' is not a mapping such as {prompt: a cat}"),
        ("images: [{widht: 64}]", "unknown field 'images[0].widht'; did you mean 'width'?"),
        ("images: [{priority: 1}]", "images[0].priority can stand only at the top of the file, not in an entry of images"),
        ("prompts: [b]", "prompt and prompts cannot stand together; keep one"),
    ],
)  # fmt: skip
def test_a_refusal_names_line_field_value_and_what_was_expected(line, message):
    """The message has all that a person needs to correct the second line."""
    assert refusal(f"prompt: a\n{line}\n") == [f"line 2: {message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt: ""', "line 1: prompt='' is not text of 1 to 20,000 characters"),
        ("prompt: ' '", "line 1: prompt=' ' is blank; expected text of 1 to 20,000 characters"),
        ("prompt:", "line 1: prompt is required"),
        ("steps: 9", "line 1: prompt is required"),
        (f"prompt: {'a' * 20001}", f"line 1: prompt='{'a' * 60}'... is not text of 1 to 20,000 characters; it has 20,001"),
        ('prompt: "a\\0"', "line 1: prompt='a\\x00' contains the control character '\\x00'; of these only line breaks and tabs are allowed"),
        ('prompt: "a\\e[31m"', "line 1: prompt='a\\x1b[31m' contains the control character '\\x1b'; of these only line breaks and tabs are allowed"),
        ("prompt: [a, b]", "line 1: prompt=[...] is not text of 1 to 20,000 characters; write prompts: for a list"),
        ("prompts: a", "line 1: prompts='a' is not a list of prompts"),
        ("prompts: [a, '']", "line 1: prompts[1]='' is not text of 1 to 20,000 characters"),
        ("prompts: []", "line 1: prompts=[] is not a list of prompts"),
        ("images: []", "line 1: images=[] is not a list of mappings such as {prompt: a cat}"),
        ("- prompt: a", "line 1: expected a mapping, not a list; write `images:` (or `prompts:`) above the list"),
        ("a cat", "line 1: expected a mapping such as `prompt: a cat`, not 'a cat'"),
        ("---\n---", "the file asks for no image; write a prompt into it"),
        (" \n", "the file is empty"),
        ("", "the file is empty"),
    ],
)  # fmt: skip
def test_a_file_without_a_usable_prompt_is_refused(text, message):
    """A prompt is required; it is text and not blank."""
    assert refusal(text) == [message]


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ("1024x768", (1024, 768)),
        ("768X512", (768, 512)),
        ("16:9", (1360, 768)),
        ("9:16", (768, 1360)),
        ("1:1", (1024, 1024)),
        ("2.39:1", (1584, 656)),
    ],
)
def test_size_is_two_sides_or_a_ratio_at_the_default_area(size, sides):
    """A ratio is rounded to multiples of 16."""
    spec = image(f"prompt: a\nsize: {size}")

    assert (spec.width, spec.height) == sides


def test_a_ratio_never_exceeds_the_megapixels_by_rounding():
    """2048x2048 as 16:9 would be 2736x1536, which is 4.2025 megapixels."""
    spec = image("prompt: a\nsize: 16:9", settings=configured(defaults={"width": 2048, "height": 2048}))  # fmt: skip

    assert (spec.width, spec.height) == (2720, 1536)


def test_size_must_agree_with_width_and_height():
    """Both may be given if they say the same."""
    spec = image("prompt: a\nsize: 1024x768\nwidth: 1024")

    assert (spec.width, spec.height) == (1024, 768)
    assert refusal("prompt: a\nsize: 1024x768\nwidth: 512") == [
        "line 3: size='1024x768' and width=512 disagree; give one of them"
    ]


def test_a_problem_of_an_entry_names_the_entry_and_its_line():
    """Entries count from 0, as in the path of a JSON value."""
    text = "images:\n- prompt: a\n- prompt: b\n  width: 100\n- steps: 3\n"

    assert refusal(text) == [
        "line 4: images[1].width=100 is not a multiple of 16 in [64, 4096]",
        "line 5: images[2].prompt is required",
    ]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_is_taken(scheduler):
    """Each name is taken as a field and as an argument."""
    assert image(f"prompt: a\nscheduler: {scheduler}").scheduler == scheduler
    assert image(f"--prompt a --sampler_name {scheduler}", ".txt").scheduler == scheduler
