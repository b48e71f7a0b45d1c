"""Job files: every field, every format, and what hostile bytes come to."""

import json
import random
import shlex

import pytest

import parsers
from promptdrop import config
from promptdrop.errors import RequestError
from promptdrop.nouns import SCHEDULERS, ImageSpec, Request, seed_of
from promptdrop.request.decode import decode
from promptdrop.request.parse import parse, with_seeds
from promptdrop.request.schema import request_schema
from promptdrop.request.text_reader import scheduler_of, words

CONFIG = config.parse({"model": {"id": "x"}})
SUFFIXES = (".txt", ".prompt", ".yaml", ".yml", ".json", ".jsonl", ".csv")


def configured(**sections):
    return config.parse({"model": {"id": "x"}, **sections})


def images(text, suffix=".yaml", settings=CONFIG):
    data = text if isinstance(text, bytes) else text.encode()
    return parse(data, suffix, settings).images


def image(text, suffix=".yaml", settings=CONFIG):
    (spec,) = images(text, suffix, settings)
    return spec


def refusal(text, suffix=".yaml", settings=CONFIG):
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(RequestError) as caught:
        parse(data, suffix, settings)
    return [str(problem) for problem in caught.value.problems]


def test_every_default_is_filled_in_from_the_configuration():
    """A job file needs nothing but a prompt."""
    settings = configured(
        defaults={"width": 512, "height": 768, "steps": 4, "guidance_scale": 1},
        output={"format": "webp"},
        engine={"image_timeout_seconds": 33},
    )
    expected = ImageSpec(
        image=1,
        prompt="a cat",
        negative_prompt=None,
        width=512,
        height=768,
        steps=4,
        guidance_scale=1.0,
        seed=None,
        scheduler="euler",
        format="webp",
        timeout_seconds=33.0,
        meta={},
    )

    assert parse(b"prompt: a cat\n", ".yaml", settings) == Request((expected,), 0)


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
        ("timeout_seconds: 86400", "timeout_seconds", 86400.0),
        ("meta: {a: [1, null, yes, 1.5]}", "meta", {"a": [1, None, "yes", 1.5]}),
    ],
)
def test_a_field_means_what_the_contract_says(line, field, value):
    """YAML 1.2 core scalars; text fields as written; null is not given, but for a prompt."""
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
        ("timeout_seconds: 0", "timeout_seconds=0 is not a number of seconds above 0, at most 86400"),
        ("timeout_seconds: .inf", "timeout_seconds=.inf is not a number of seconds above 0, at most 86400"),
        ("timeout_seconds: 86401", "timeout_seconds=86401 is not a number of seconds above 0, at most 86400"),
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
    """The second line is at fault, and the message says all a person needs."""
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
    """A prompt is required, text, and not blank."""
    assert refusal(text) == [message]


def test_all_problems_of_a_file_are_told_at_once():
    """In the order of their lines, at most twenty."""
    text = "width: 1\nprompt: a\nheight: 2\nsteps: 0\n"

    assert refusal(text) == [
        "line 1: width=1 is not a multiple of 16 in [64, 4096]",
        "line 3: height=2 is not a multiple of 16 in [64, 4096]",
        "line 4: steps=0 is not an integer in [1, 100]",
    ]
    assert len(refusal("".join(f"k{n}: 1\n" for n in range(100)))) == 20


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
    """Both may be given, but say the same."""
    spec = image("prompt: a\nsize: 1024x768\nwidth: 1024")

    assert (spec.width, spec.height) == (1024, 768)
    assert refusal("prompt: a\nsize: 1024x768\nwidth: 512") == [
        "line 3: size='1024x768' and width=512 disagree; give one of them"
    ]


def test_limits_of_the_configuration_hold():
    """Megapixels, priority and the size of the file."""
    settings = configured(limits={"priority": 5, "job_file_kib": 1})

    assert refusal("prompt: a\nwidth: 4096\nheight: 2048") == [
        "line 2: width=4096 and height=2048 make 8.39 megapixels;"
        " expected at most 4.2 (limits.megapixels)"
    ]
    assert refusal("prompt: a\npriority: 6", settings=settings) == [
        "line 2: priority=6 is not an integer in [-100, 5] (limits.priority)"
    ]
    assert refusal("a" * 1025, ".txt", settings) == [
        "the file has 1025 bytes; expected at most 1 KiB (limits.job_file_kib)"
    ]


@pytest.mark.parametrize(
    ("text", "suffix", "where"),
    [
        ("prompt: a\ncount: 1000000000000", ".yaml", "line 2: count=1000000000000: "),
        ("prompts: [a, b]\nseed: [1, 2, 3]", ".yaml", "line 2: "),
        ("prompt: a\nimages: [{}, {}, {}, {}, {}, {}]", ".yaml", "line 2: "),
        ("a\n" * 6, ".txt", "line 6: "),
        ("prompt\n" + "a\n" * 6, ".csv", "line 7: "),
    ],
)
def test_more_images_than_the_limit_are_refused_before_they_are_made(text, suffix, where):
    """A count of 10**12 takes neither time nor memory; the field that asks for it is named."""
    settings = configured(limits={"images_per_job": 5})

    assert refusal(text, suffix, settings) == [
        f"{where}more than 5 images in one job (limits.images_per_job)"
    ]


def test_images_are_numbered_by_document_entry_prompt_seed_and_count():
    """The contract's own example, then a second document."""
    made = images("prompts: [a, b]\ncount: 2\nseed: 5\n---\nprompt: c\nseed: [8, 3]\n")

    assert [(spec.image, spec.prompt, spec.seed) for spec in made] == [
        (1, "a", 5),
        (2, "a", 6),
        (3, "b", 5),
        (4, "b", 6),
        (5, "c", 8),
        (6, "c", 3),
    ]


def test_an_entry_wins_over_the_top():
    """Field by field; a size of the entry replaces both sides of the top."""
    made = images(
        "prompt: top\nsteps: 4\nsize: 512x256\nmeta: {a: 1}\npriority: 7\n"
        "images:\n- {}\n- {prompt: own, steps: 5}\n- {width: 768}\n- {size: 64x64, meta: {}}\n"
    )

    assert [(s.prompt, s.steps, s.width, s.height, s.meta) for s in made] == [
        ("top", 4, 512, 256, {"a": 1}),
        ("own", 5, 512, 256, {"a": 1}),
        ("top", 4, 768, 256, {"a": 1}),
        ("top", 4, 64, 64, {}),
    ]


def test_a_problem_of_an_entry_names_the_entry_and_its_line():
    """Entries count from 0, as in the path of a JSON value."""
    text = "images:\n- prompt: a\n- prompt: b\n  width: 100\n- steps: 3\n"

    assert refusal(text) == [
        "line 4: images[1].width=100 is not a multiple of 16 in [64, 4096]",
        "line 5: images[2].prompt is required",
    ]


def test_seeds_and_count_do_not_contradict():
    """A list of seeds leaves count at 1, and seed + count - 1 is a seed too."""
    assert refusal("prompt: a\nseed: [1, 2]\ncount: 2") == [
        "line 3: count=2 with a list of seeds; count then stays 1"
    ]
    assert refusal("prompt: a\nseed: 9223372036854775807\ncount: 2") == [
        "line 2: seed=9223372036854775807 and count=2 go beyond 2**63-1"
    ]


def test_priority_is_the_job_s():
    """Documents may repeat it but not contradict it."""
    request = parse(b"prompt: a\npriority: 3\n---\nprompt: b\npriority: 3\n", ".yaml", CONFIG)

    assert request.priority == 3
    assert refusal("prompt: a\npriority: 3\n---\nprompt: b\npriority: 4\n") == [
        "line 5: priority=4 but 3 on line 2; a job has one priority"
    ]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_is_taken(scheduler):
    """Each name of the contract, as a field and as an argument."""
    assert image(f"prompt: a\nscheduler: {scheduler}").scheduler == scheduler
    assert image(f"--prompt a --sampler_name {scheduler}", ".txt").scheduler == scheduler


def test_seeds_come_from_the_job_s_id_where_the_file_names_none():
    """Named seeds stay."""
    request = with_seeds(parse(b"prompt: a\nimages: [{}, {seed: 7}]", ".yaml", CONFIG), "id")

    assert [spec.seed for spec in request.images] == [seed_of("id", 1), 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt: &a x", "line 1: anchors are not allowed: &a"),
        ("prompt: x\nmeta: {b: *a}", "line 2: aliases are not allowed: *a"),
        ("prompt: !!python/object:os.system x", "line 1: tags are not allowed: tag:yaml.org,2002:python/object:os.system"),
        ("prompt: x\nprompt: y", "line 2: duplicate key 'prompt'"),
        ("prompt: x\n? [a]\n: b", "line 2: a key must be a single value"),
        ("prompt: x\n b: c", "line 2: not valid YAML: mapping values are not allowed in this context"),
        ("[" * 25000, "line 1: nested deeper than 16"),
        ("prompt: x\nmeta: {a: " + "[" * 15 + "]" * 15 + "}", "line 2: nested deeper than 16"),
        ("a: {b: " * 20, "line 1: not valid YAML: did not find expected ',' or '}'"),
        ("- x\n" * 250_001, "line 250000: more than 250000 values"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused(text, message):
    """Nothing expands, recurses or builds objects."""
    assert refusal(text, ".yml") == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a",\n "prompt": "b"}', "line 2: duplicate key 'prompt'"),
        ('{"prompt": "a",\n "seed": NaN}', "line 2: NaN is not allowed in JSON; numbers are finite"),
        ('{"seed": -Infinity}', "line 1: -Infinity is not allowed in JSON; numbers are finite"),
        ('{"prompt": "a", "meta": {"a": 1e999}}', "line 1: meta={...} contains a number that is not finite"),
        ('{"prompt": "a",\n}', "line 2: not valid JSON: Expecting property name enclosed in double quotes (column 1)"),
        ('{"prompt": "a"} {}', "line 1: not valid JSON: Extra data (column 17)"),
        ('{\n"prompt": "a",\n"images": [\n{"width": 1}]}', "line 4: images[0].width=1 is not a multiple of 16 in [64, 4096]"),
        ('{"prompt": null}', "line 1: prompt is required"),
        ("null", "line 1: expected a mapping such as `prompt: a cat`, not null"),
        ('{"prompt": "\\ud800"}', "line 1: prompt='\\ud800' contains half a surrogate pair; expected Unicode text"),
        ('{"prompt": "a", "meta": {"a": "\\ud800"}}', "line 1: meta={...} contains half a surrogate pair, which no UTF-8 file can hold"),
        ("[" * 100_000, "line 1: nested deeper than 16"),
        ("[" * 17 + "]" * 17, "line 1: nested deeper than 16"),
        ('{"seed": ' + "9" * 5000 + "}", "line 1: a number of more than 400 digits: 99999999999999999999..."),
        ('[{"prompt": "a"}]', "line 1: expected a mapping, not a list; write `images:` (or `prompts:`) above the list"),
    ],
)  # fmt: skip
def test_hostile_json_is_refused(text, message):
    """With the line of the fault."""
    assert refusal(text, ".json") == [message]


def test_json_takes_text_as_written_and_null_as_not_given():
    """A number is a prompt of digits, an escaped pair one character, CR LF a line end."""
    text = '{"images": [{"prompt": 1e3}, {"prompt": "\\ud83d\\ude00\\r\\nb", "seed": null}, {"prompt": true}]}'  # fmt: skip

    assert [spec.prompt for spec in images(text, ".json")] == ["1e3", "😀\nb", "true"]


def test_jsonl_is_one_mapping_per_line():
    """Blank lines are skipped, and every bad line is told."""
    good = '{"prompt": "a"}\n\n{"prompts": ["b", "c"]}\r\n'

    assert [spec.prompt for spec in images(good, ".jsonl")] == ["a", "b", "c"]
    assert refusal('{"prompt": "a"}\n{"prompt"}\n{"prompt": "b", "steps": 0}\n{}', ".jsonl") == [
        "line 2: not valid JSON: Expecting ':' delimiter (column 10)",
        "line 3: steps=0 is not an integer in [1, 100]",
        "line 4: prompt is required",
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_is_a_header_and_rows(separator):
    """An empty cell is not given; seeds are a list; meta.KEY stays text."""
    rows = [["prompt", "size", "seed", "meta.client"], ['"a, ; cat"', "16:9", "1 2", "007"], ["b"]]
    text = "\ufeff" + "\r\n".join(separator.join(row) for row in rows)

    assert [(s.prompt, s.width, s.seed, s.meta) for s in images(text, ".csv")] == [
        ("a, ; cat", 1360, 1, {"client": "007"}),
        ("a, ; cat", 1360, 2, {"client": "007"}),
        ("b", 1024, None, {}),
    ]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("promt,width,width\na,1,1", ["line 1: unknown column 'promt'; did you mean 'prompt'?", "line 1: column 'width' stands twice in the header"]),
        ('prompt,width\n"a\nb",768\n\nc,100', ["line 5: width=100 is not a multiple of 16 in [64, 4096]"]),
        ("prompt,width\na, cat,768", ["line 2: 3 cells where the header has 2; put a text that contains the separator into double quotes"]),
        ('prompt\n"abc\n', ["line 2: not valid CSV: unexpected end of data; is a double quote missing?"]),
        ("prompt,\na,b", ["line 2: 'b' stands in a column without a name"]),
        ("prompt,width\n,768", ["line 2: prompt is required"]),
        ("prompt\n" + "a" * 200_000, ["line 2: not valid CSV: field larger than field limit (131072); is a double quote missing?"]),
        ("prompt", ["the file asks for no image; write a prompt into it"]),
    ],
)  # fmt: skip
def test_a_bad_csv_is_refused(text, messages):
    """Line numbers count the lines inside quotes."""
    assert refusal(text, ".csv") == messages


def test_text_is_one_image_per_line():
    """Blank lines and comments are skipped; `#tag` and `-- x` are prompts."""
    text = "a cat\r\n\r\n# no\n#\n#tag\n-- x\n  a dog  \n"

    assert [spec.prompt for spec in images(text, ".PROMPT")] == ["a cat", "#tag", "-- x", "a dog"]


def test_a_line_of_arguments_is_quoted_as_in_a_shell():
    """`--key value` and `--key=value`, `-` for `_`, and A1111's own names."""
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
    """With the number of their line."""
    assert refusal(f"a cat\n{line}\n", ".txt") == [f"line 2: {message}"]


@pytest.mark.parametrize(
    "line",
    ["a b", "'a b' c", '"a\\"b\\\\c\\d"', "a\\ b", "a'b'\"c\"d", "''", "  a  ", "a''b", '""'],
)
def test_words_are_those_of_shlex(line):
    """Our reader differs from shlex only in its time."""
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
    """Schedule words are dropped; what we do not have is not guessed."""
    assert scheduler_of(sampler) == scheduler


def test_a_file_that_is_one_infotext_is_one_image():
    """Its settings are used, unknown ones ignored; seed -1 is not given."""
    text = (
        "a cat,\non a sofa\nNegative prompt: blurry\nugly\n"
        'Steps: 20, Sampler: Euler, CFG scale: 7.5, Seed: -1, Size: 512x768, Model: "a, b: c"\n'
    )
    spec = image(text, ".txt")

    assert (spec.prompt, spec.negative_prompt) == ("a cat,\non a sofa", "blurry\nugly")
    assert (spec.steps, spec.guidance_scale, spec.width, spec.height) == (20, 7.5, 512, 768)
    assert (spec.scheduler, spec.seed) == ("euler", None)


def test_a_bad_infotext_is_refused():
    """An unknown sampler, a size we cannot do, two infotexts in one file."""
    last = "Steps: 20, Sampler: Euler a, Seed: 1, Size: 500x768"

    assert refusal(f"a cat\n{last}", ".txt") == [
        "line 2: Sampler='Euler a' is not one of Euler, DPM++ 2M, DPM++ 2M SDE, UniPC, Heun",
        "line 2: size='500x768' is not WxH such as 1024x768 (multiples of 16 in [64, 4096])"
        " or an aspect ratio such as 16:9",
    ]
    assert refusal("a\nSteps: 9, Sampler: Euler\nb\nSteps: 9, Sampler: Euler", ".txt") == [
        "line 4: a second infotext in one file; put each into a file of its own"
    ]


@pytest.mark.parametrize(
    ("data", "encodings"),
    [
        ("猫 é".encode(), ["utf-8"]),
        ("猫 é".encode("utf-8-sig"), []),
        ("猫 é".encode("utf-16"), ["utf-8"]),
        (b"\xfe\xff" + "猫 é".encode("utf-16-be"), ["utf-8"]),
        ("猫 é".encode("gb18030"), ["utf-8", "gb18030"]),
        ("猫 é".encode("utf-16-le"), ["utf-16-le"]),
    ],
)
def test_text_is_decoded(data, encodings):
    """UTF-8 first, UTF-16 by its BOM, the rest only when named."""
    assert decode(data, encodings) == "猫 é"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\xe9", "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8, or name its encoding in inbox.encodings"),
        (b"a\nb\0", "line 2: a NUL byte: not text, or UTF-16 without a BOM; save it as UTF-8"),
        ("ab".encode("utf-32"), "the file is UTF-32; save it as UTF-8"),
        (b"\xff\xfea", "the file begins like UTF-16 but is not; save it as UTF-8"),
        ("a\0".encode("utf-16"), "the file begins like UTF-16 but is not; save it as UTF-8"),
    ],
)  # fmt: skip
def test_what_is_not_text_is_refused(data, message):
    """In words that say how to save it."""
    assert refusal(data, ".txt") == [message]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_crlf_and_a_bom_change_nothing(suffix):
    """Windows editors write both."""
    text = {".csv": "prompt\na\n", ".json": '{"prompt":\n"a"}\n', ".jsonl": '{"prompt": "a"}\n'}
    data = text.get(suffix, "prompt: a\n" if suffix in (".yaml", ".yml") else "a\n")

    assert image(data.replace("\n", "\r\n").encode("utf-8-sig"), suffix.upper()).prompt == "a"


def test_an_unknown_suffix_is_refused():
    """The inbox never hands one over; a command might."""
    assert refusal("a", ".doc") == [
        "'.doc' is not one of .txt, .prompt, .yaml, .yml, .json, .jsonl, .csv"
    ]


def test_the_schema_names_every_field():
    """With a description and an example for each, and no others allowed."""
    schema = request_schema()
    fields = schema["properties"]

    assert schema["additionalProperties"] is False
    assert [name for name in fields if not fields[name].get("description")] == []
    assert {"prompt", "prompts", "images", "priority", "meta", "size"} <= fields.keys()
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("suffix", parsers.SEEDS)
def test_nothing_but_a_refusal_escapes(suffix):
    """2,000 mutations of a good file: a Request or a RequestError, never anything else."""
    chance = random.Random(suffix)
    pieces = [
        b"\0",
        b"\xff",
        b"[",
        b"{",
        b'"',
        b"'",
        b":",
        b",",
        b"-",
        b"\n",
        b"\\ud800",
        b"9" * 500,
    ]
    pieces += [b"1e999", b"&a", b"*a", b"!!x", b"? ", b"\\", b"\r", b"\xc2\x85", b"---\n", b"%", b"|"]  # fmt: skip
    pieces += [b"null", b"Steps: 1, Sampler: x", b"--", b";", b"\t", b"width", b"0:0", b"\xef\xbb\xbf", b".nan"]  # fmt: skip
    for _ in range(2000):
        data = bytearray(parsers.SEEDS[suffix].encode())
        for _ in range(chance.randint(1, 5)):
            at = chance.randrange(len(data) + 1)
            data[at : at + chance.choice((0, 0, 1, 4))] = chance.choice(pieces)
        parsers.job_file(bytes(data), suffix)
