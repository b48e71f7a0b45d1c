"""Fuzz every parser, guided by coverage: python tests/support/fuzz.py CORPUS [libFuzzer options].

CORPUS: a folder that new inputs are added to; it begins with a good file of each format. The
first byte of an input chooses the parser. https://github.com/google/atheris
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["promptdrop"]):
    import parsers

SUFFIXES = tuple(parsers.SEEDS)
LONGEST = 1 << 13  # bytes; longer ones make the search slow and find nothing new


def one_input(data: bytes) -> None:
    """Raises what a parser must not raise."""
    if not data:
        return
    choice, rest = data[0] % (len(SUFFIXES) + len(parsers.OTHERS)), data[1:]
    if choice < len(SUFFIXES):
        parsers.job_file(rest, SUFFIXES[choice])
    else:
        parsers.OTHERS[choice - len(SUFFIXES)](rest)


def main() -> None:
    """Runs until a fault or the options' end."""
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(parsers.SEEDS.values()):
        (corpus / f"seed-{number}").write_bytes(bytes([number]) + text.encode())
    shipped = Path(__file__).parents[2] / "config.yaml"
    (corpus / "seed-config").write_bytes(bytes([len(SUFFIXES)]) + shipped.read_bytes())
    atheris.Setup(
        [*sys.argv, f"-max_len={LONGEST}", "-timeout=10", "-rss_limit_mb=1024"], one_input
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
