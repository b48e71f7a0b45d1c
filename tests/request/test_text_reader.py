"""Text files: a prompt a line, lines of arguments, A1111's infotext."""

import shlex

import pytest

from job_files import image, images, refusal
from promptdrop.request.text_reader import scheduler_of, words


def test_text_is_one_image_per_line():
    """Blank lines and comments are skipped; `#tag` and `-- x` are prompts."""
    text = "a cat\r\n\r\n# no\n#\n#tag\n-- x\n  a dog  \n"

    assert [spec.prompt for spec in images(text, ".PROMPT")] == ["a cat", "#tag", "-- x", "a dog"]


def test_a_line_of_arguments_is_quoted_as_in_a_shell():
    """`--key value` and `--key=value` are the same, so are `-` and `_`; A1111's names are known."""
    text = (
        '--prompt "a \\"cat\\"" --negative-prompt=blurry --size 768x512 --seed 7 --steps 4\n'
        "--prompt 'it''s' --cfg_scale 3.5 --sampler_name Euler --n_iter 2\n"
    )
    first, second, third = images(text, ".txt")

    assert (first.prompt, first.negative_prompt, first.width) == ('a "cat"', "blurry", 768)
    assert (first.seed, first.steps) == (7, 4)
    assert (second.prompt, second.guidance_scale, second.scheduler) == ("its", 3.5, "euler")
    assert third.image == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--width 768", "prompt is required"),
        ('--prompt "a cat', "the quote at column 10 is not closed: '\"a cat'"),
        ("--prompt a\\", "nothing follows the last backslash"),
        ("--prompt a cat", "unexpected 'cat'; put a text with blanks into double quotes"),
        ("--prompt", "'--prompt' needs a value"),
        ("--prompt --width 64", "'--prompt' needs a value"),
        ("--prompt a --prompt b", "prompt is given twice, as 'prompt'"),
        ("--prompt a --n_iter 2 --batch_size 2", "count is given twice, as 'n_iter' and 'batch_size'"),
        ("--prompt a --promt b", "unknown field 'promt'; did you mean 'prompt'?"),
        ("--prompt a --meta x", "meta='x' is not a mapping of at most 16 KiB as JSON"),
        ('--prompt ""', "prompt='' is not text of 1 to 20,000 characters"),
        ("--prompt a --sampler_name 'Euler a'", "sampler_name='Euler a' is not one of Euler, DPM++ 2M, DPM++ 2M SDE, UniPC, Heun"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(line, message):
    """The refusal has the number of their line."""
    assert refusal(f"a cat\n{line}\n", ".txt") == [f"line 2: {message}"]


@pytest.mark.parametrize(
    "line",
    ["a b", "'a b' c", '"a\\"b\\\\c\\d"', "a\\ b", "a'b'\"c\"d", "''", "  a  ", "a''b", '""'],
)
def test_words_are_those_of_shlex(line):
    """Our reader gives the same words as shlex, which takes far longer."""
    assert words(line) == shlex.split(line)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("Euler", "euler"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPM++ 2M Karras", "dpmpp_2m"),
        ("DPM++ 2M SDE", "dpmpp_2m_sde"),
        ("DPM++ 2M SDE SGM Uniform", "dpmpp_2m_sde"),
        ("unipc", "unipc"),
        ("Heun Exponential", "heun"),
        ("dpmpp_2m", "dpmpp_2m"),
        ("Euler a", None),
        ("DPM++ 2M SDE Heun", None),
        ("Karras", None),
    ],
)
def test_samplers_of_a1111_have_a_scheduler(sampler, scheduler):
    """Words for a schedule are dropped; a sampler that we do not have is not guessed."""
    assert scheduler_of(sampler) == scheduler


def test_a_file_that_is_one_infotext_is_one_image():
    """Its settings are used, unknown ones are ignored, and a seed of -1 is not given."""
    text = (
        "a cat,\non a sofa\nNegative prompt: blurry\nugly\n"
        'Steps: 20, Sampler: Euler, CFG scale: 7.5, Seed: -1, Size: 512x768, Model: "a, b: c"\n'
    )
    spec = image(text, ".txt")

    assert (spec.prompt, spec.negative_prompt) == ("a cat,\non a sofa", "blurry\nugly")
    assert (spec.steps, spec.guidance_scale, spec.width, spec.height) == (20, 7.5, 512, 768)
    assert (spec.scheduler, spec.seed) == ("euler", None)


def test_a_bad_infotext_is_refused():
    """An unknown sampler, an impossible size and a second infotext in one file are refused."""
    last = "Steps: 20, Sampler: Euler a, Seed: 1, Size: 500x768"

    assert refusal(f"a cat\n{last}", ".txt") == [
        "line 2: Sampler='Euler a' is not one of Euler, DPM++ 2M, DPM++ 2M SDE, UniPC, Heun",
        "line 2: size='500x768' is not WxH such as 1024x768 (multiples of 16 in [64, 4096])"
        " or an aspect ratio such as 16:9",
    ]
    assert refusal("a\nSteps: 9, Sampler: Euler\nb\nSteps: 9, Sampler: Euler", ".txt") == [
        "line 4: a second infotext in one file; put each into a file of its own"
    ]
