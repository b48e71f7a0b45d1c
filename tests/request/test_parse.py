"""From a file to its images: defaults, entries, numbers, seeds, priority and limits."""

import random

import pytest

import parsers
from job_files import CONFIG, configured, images, refusal
from promptdrop.nouns import ImageSpec, Request, seed_of
from promptdrop.request.parse import parse, with_seeds


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


def test_all_problems_of_a_file_are_told_at_once():
    """They come in the order of their lines, at most twenty."""
    text = "width: 1\nprompt: a\nheight: 2\nsteps: 0\n"

    assert refusal(text) == [
        "line 1: width=1 is not a multiple of 16 in [64, 4096]",
        "line 3: height=2 is not a multiple of 16 in [64, 4096]",
        "line 4: steps=0 is not an integer in [1, 100]",
    ]
    assert len(refusal("".join(f"k{n}: 1\n" for n in range(100)))) == 20


def test_limits_of_the_configuration_hold():
    """Megapixels, timeout, priority and the size of the file are limited."""
    settings = configured(limits={"priority": 5, "job_file_kib": 1, "timeout_seconds": 2.5})

    assert refusal("prompt: a\nwidth: 4096\nheight: 2048") == [
        "line 2: width=4096 and height=2048 make 8.39 megapixels;"
        " expected at most 4.2 (limits.megapixels)"
    ]
    assert refusal("prompt: a\npriority: 6", settings=settings) == [
        "line 2: priority=6 is not an integer in [-100, 5] (limits.priority)"
    ]
    assert refusal("prompt: a\ntimeout_seconds: 3", settings=settings) == [
        "line 2: timeout_seconds=3 is not a number of seconds above 0,"
        " at most 2.5 (limits.timeout_seconds)"
    ]
    assert refusal("a" * 1025, ".txt", settings) == [
        "the file has 1025 bytes; expected at most 1 KiB (limits.job_file_kib)"
    ]


@pytest.mark.parametrize(
    ("text", "suffix", "where"),
    [
        ("prompt: a\ntimeout_seconds: 86400", ".yaml", "line 2: "),
        ("images:\n- prompt: a\n  timeout_seconds: 86400", ".yaml", "line 3: images[0]."),
        ('{"prompt": "a",\n"timeout_seconds": 86400}', ".json", "line 2: "),
        ('{"prompt": "a"}\n{"prompt": "a", "timeout_seconds": 86400}', ".jsonl", "line 2: "),
        ("prompt,timeout_seconds\na,2.5\na,86400", ".csv", "line 3: "),
        ("a\n--prompt a --timeout_seconds 86400", ".txt", "line 2: "),
    ],
)
def test_no_format_asks_for_a_longer_timeout(text, suffix, where):
    """`limits.timeout_seconds` holds in each; the administrator's own timeouts may be longer."""
    settings = configured(
        limits={"timeout_seconds": 2.5},
        engine={"image_timeout_seconds": 3000},
        folders={"slow": {"timeout_seconds": 4000}},
    )
    slow = settings.in_folder("slow")
    plain = [parse(b"a", ".txt", one).images[0].timeout_seconds for one in (settings, slow)]

    assert plain == [3000, 4000]
    for one in (settings, slow):
        assert refusal(text, suffix, one) == [
            f"{where}timeout_seconds=86400 is not a number of seconds above 0,"
            " at most 2.5 (limits.timeout_seconds)"
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
    """Counting goes on from one document to the next."""
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
    """Each field of an entry wins over the one at the top; its size replaces both sides."""
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


def test_seeds_come_from_the_job_s_id_where_the_file_names_none():
    """Seeds that the file gives are kept."""
    request = with_seeds(parse(b"prompt: a\nimages: [{}, {seed: 7}]", ".yaml", CONFIG), "id")

    assert [spec.seed for spec in request.images] == [seed_of("id", 1), 7]


def test_an_unknown_suffix_is_refused():
    """The inbox has no such files, but a command may be given one."""
    assert refusal("a", ".doc") == [
        "'.doc' is not one of .txt, .prompt, .yaml, .yml, .json, .jsonl, .csv"
    ]


@pytest.mark.parametrize("suffix", parsers.SEEDS)
def test_nothing_but_a_refusal_escapes(suffix):
    """Each of 2,000 mutations of a good file is a Request or a RequestError."""
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
