"""`promptdrop schema`: print the JSON Schema of job files, sidecars, job.json or the status."""

import argparse

from promptdrop.cli import terminal


def declare_schema(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `schema`."""
    parser.add_argument("what", choices=("request", "image", "job", "status"))


def schema(arguments: argparse.Namespace) -> None:
    """Print the schema of one kind of document."""
    from promptdrop import records
    from promptdrop.request.schema import request_schema

    if arguments.what == "request":
        document = request_schema()
    else:
        kind = records.SCHEMAS[arguments.what]
        document = kind.model_json_schema(by_alias=True, mode="serialization")
    terminal.say_json(document, indent=2)
