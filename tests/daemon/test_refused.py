"""Files that are refused: each has a short reason in failed/, and others are unaffected."""

from harness import Daemon, MakeDaemon, works
from users import obedient


def test_hostile_files_are_refused_and_others_unaffected(make_daemon: MakeDaemon) -> None:
    """Each has a reason in failed/, byte for byte the file that was dropped; the daemon lives."""
    bomb = "a: &a [x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
    )
    hostile: dict[str, bytes] = {
        "empty.txt": b"",
        "big.txt": b"a cat\n" * 2000,
        "binary.txt": b"PK\x03\x04\0\0\0\xff" * 20,
        "nul.txt": b"\0" * 500,
        "latin.txt": "caf\xe9\n".encode("latin-1"),
        "bomb.yaml": bomb.encode(),
        "brackets.yaml": b"[" * 7000,
        "brackets.json": b"[" * 7000,
        "torn.json": b'{"prompt": "a c',
        "tag.yaml": b"prompt: !!python/object/apply:os.system [id]\n",
        "twice.yaml": b"prompt: a\nprompt: b\n",
        "unknown.yaml": b"prompt: a\nwidht: 64\n",
        "comments.txt": b"# nothing\n\n",
        "list.json": b"[1, 2]",
        "huge.json": b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        "nan.json": b'{"prompt": "a", "guidance_scale": NaN}',
        "surrogate.json": b'{"prompt": "\\ud800"}',
        "quote.txt": b'--prompt "a cat\n',
        "header.csv": b"prompt;colour\na;b\n",
    }
    daemon = make_daemon({"limits": {"job_file_kib": 8}})
    for name, content in hostile.items():
        daemon.drop(name, content)
    daemon.drop("fine.txt", "a cat\n")
    done = daemon.drain()
    records = {name: daemon.error(name) for name in hostile}

    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert daemon.job("fine")["outcome"] == "done"
    assert [file for file, _ in daemon.published()] == ["fine/fine-0001.png"]
    for name, record in records.items():
        assert record["outcome"] == "refused", name
        assert 0 < len(record["error"]) < 2000, (name, record["error"])
        assert (daemon.failed / name).read_bytes() == hostile[name]
    assert "job_file_kib" in records["big.txt"]["error"]
    assert "empty" in records["empty.txt"]["error"]
    assert "'width'" in records["unknown.yaml"]["error"]
    assert not any(daemon.inbox.iterdir())


def test_25000_brackets_harm_nobody(daemon: Daemon) -> None:
    """Input at which PyYAML's C parser crashes with a segmentation fault is refused."""
    for name in ("a.yaml", "b.json", "c.jsonl"):
        daemon.drop(name, b"[" * 25_000)
    done = daemon.drain()

    assert done.returncode == 0
    assert {daemon.error(n)["outcome"] for n in ("a.yaml", "b.json", "c.jsonl")} == {"refused"}


def test_a_file_full_of_mistakes_has_a_short_reason(daemon: Daemon) -> None:
    """Thousands of wrong lines do not make thousands of lines in the log."""
    daemon.drop("a.txt", "--prompt x --widht 7\n" * 5000)
    daemon.drain()
    (refused,) = daemon.log("job.refused")

    assert len(refused["error"]) < 5000
    assert "line 1" in refused["error"]


def test_an_unreadable_file_is_refused_with_its_owner_and_mode(daemon: Daemon) -> None:
    """A person can act on it; others are unaffected."""
    wrapper = obedient()
    daemon.drop("a.txt", "a cat\n").chmod(0)
    daemon.start(wrapper=wrapper)
    record = daemon.error("a.txt")

    assert record["outcome"] == "refused"
    assert "mode 0000" in record["error"]
    works(daemon)
    assert daemon.stop() == 0


def test_prompt_overflow_refuse(make_daemon: MakeDaemon) -> None:
    """A prompt too long refuses the whole file before its first image; no folder is left."""
    daemon = make_daemon({"prompt": {"overflow": "refuse", "max_tokens": 20}})
    daemon.drop("long.txt", "short\n" + "word " * 30 + "\n")
    daemon.drop("short.txt", "a cat\n")
    done = daemon.drain()
    record = daemon.error("long.txt")

    assert done.returncode == 0
    assert record["outcome"] == "refused"
    assert "image 2" in record["error"]
    assert "max_tokens" in record["error"]
    assert daemon.job("short")["outcome"] == "done"
    assert not (daemon.outbox / "long").exists()
    assert [file for file, _ in daemon.published()] == ["short/short-0001.png"]


def test_a_negative_prompt_is_counted_too(daemon: Daemon) -> None:
    """`overflow: refuse` is decided before the first image, for every text the encoder is given."""
    daemon.write_config({"prompt": {"max_tokens": 16, "overflow": "refuse"}})
    daemon.drop(
        "a.yaml",
        f"images:\n- {{prompt: a}}\n- {{prompt: b, guidance_scale: 2, negative_prompt: {'x ' * 40}}}\n",
    )
    daemon.drain()

    assert "image 2: the negative_prompt has" in daemon.error("a.yaml")["error"]
    assert daemon.tree() == ["failed/a.yaml", "failed/a.yaml.error.json"]
