"""YAML, JSON, JSONL and CSV: how good files are read and hostile ones refused."""

import pytest

from job_files import images, refusal


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
    """YAML that would expand, recurse or build objects is refused."""
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
    """The refusal has the line of the fault."""
    assert refusal(text, ".json") == [message]


def test_json_takes_text_as_written_and_null_as_not_given():
    """A number as prompt is its digits, an escaped pair is one character, CR LF is one line end."""
    text = '{"images": [{"prompt": 1e3}, {"prompt": "\\ud83d\\ude00\\r\\nb", "seed": null}, {"prompt": true}]}'  # fmt: skip

    assert [spec.prompt for spec in images(text, ".json")] == ["1e3", "😀\nb", "true"]


def test_jsonl_is_one_mapping_per_line():
    """Blank lines are skipped, and every bad line is reported."""
    good = '{"prompt": "a"}\n\n{"prompts": ["b", "c"]}\r\n'

    assert [spec.prompt for spec in images(good, ".jsonl")] == ["a", "b", "c"]
    assert refusal('{"prompt": "a"}\n{"prompt"}\n{"prompt": "b", "steps": 0}\n{}', ".jsonl") == [
        "line 2: not valid JSON: Expecting ':' delimiter (column 10)",
        "line 3: steps=0 is not an integer in [1, 100]",
        "line 4: prompt is required",
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_is_a_header_and_rows(separator):
    """An empty cell is not given, several seeds are a list, meta.KEY stays text."""
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
        ('prompt\tseed\n"a"b\t1', ["line 2: not valid CSV: '\\t' expected after '\"'; is a double quote missing?"]),
        ("prompt\n" + "a" * 200_000, ["line 2: not valid CSV: field larger than field limit (131072); is a double quote missing?"]),
        ("prompt", ["the file asks for no image; write a prompt into it"]),
    ],
)  # fmt: skip
def test_a_bad_csv_is_refused(text, messages):
    """Line numbers count the lines inside quotes."""
    assert refusal(text, ".csv") == messages
