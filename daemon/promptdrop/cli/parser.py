"""Every command in the order of `--help`: its name, function, arguments, description and example.

The modules of the commands import what a command needs when it runs, so that `--help` is instant.
"""

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from promptdrop.cli import (
    bench,
    check,
    cluster,
    daemon,
    doctor,
    generate,
    init,
    jobs,
    model,
    options,
    schema,
    status,
    submit,
    terminal,
)
from promptdrop.version import __version__


@dataclass(frozen=True, slots=True)
class Command:
    """A command, or an action of a group. `run` returns its exit status; None is 0."""

    name: str
    run: Callable[[argparse.Namespace], int | None]
    declare: Callable[[argparse.ArgumentParser], None]
    about: str
    example: str


@dataclass(frozen=True, slots=True)
class Group:
    """Commands with a first word in common, such as `model fetch` and `model path`."""

    name: str
    about: str
    actions: tuple[Command, ...]


COMMANDS: tuple[Command | Group, ...] = (
    Command(
        "init",
        init.init,
        init.declare_init,
        "write a commented config.yaml and the spool's folders; overwrite nothing",
        "promptdrop init ~/promptdrop --model /models/Z-Image-Turbo",
    ),
    Command(
        "run",
        daemon.run,
        daemon.declare_run,
        "run the daemon in the foreground",
        "promptdrop run --config ~/promptdrop/config.yaml --drain",
    ),
    Command(
        "generate",
        generate.generate,
        generate.declare_generate,
        "render images now, through the running daemon if there is one",
        'promptdrop generate "a red fox in the snow" -o fox.png --seed 7\n'
        'promptdrop generate --prompts "cat;dog;robot" --output pets/',
    ),
    Command(
        "submit",
        submit.submit,
        submit.declare_submit,
        "put jobs into the inbox in one step",
        "promptdrop submit prompts.txt --wait\n"
        'promptdrop submit --prompt "a lighthouse" --size 16:9 --count 4',
    ),
    Command(
        "check",
        check.check,
        check.declare_check,
        "show what job files ask for, or why they would be refused",
        "promptdrop check prompts.yaml",
    ),
    Command(
        "status",
        status.status,
        status.declare_status,
        "show the engine, the queue, rates and what waits",
        "promptdrop status --watch",
    ),
    Command(
        "retry",
        jobs.retry,
        jobs.declare_retry,
        "resume failed jobs: only the images that are missing",
        "promptdrop retry cats/prompts.txt",
    ),
    Command(
        "cancel",
        jobs.cancel,
        jobs.declare_cancel,
        "withdraw a pending job, or stop an active one at its next step",
        "promptdrop cancel prompts.txt",
    ),
    Command(
        "pause",
        daemon.pause,
        options.add_config,
        "stop taking new images, across restarts",
        "promptdrop pause",
    ),
    Command(
        "resume",
        daemon.resume,
        options.add_config,
        "take images again",
        "promptdrop resume",
    ),
    Command(
        "doctor",
        doctor.doctor,
        options.add_config,
        "check the configuration, folders, model, device and disk",
        "promptdrop doctor --config config.yaml",
    ),
    Group(
        "cluster",
        "the hosts of engine.backend: ray, and what they do",
        (
            Command(
                "status",
                cluster.status,
                cluster.declare_action,
                "show hosts, GPUs, engines and what each renders",
                "promptdrop cluster status",
            ),
            Command(
                "release",
                cluster.release,
                cluster.declare_action,
                "end the engines that a stopped daemon left warm",
                "promptdrop cluster release",
            ),
        ),
    ),
    Group(
        "model",
        "write the demonstration model, fetch weights, say where they are",
        (
            Command(
                "demo",
                model.demo,
                model.declare_demo,
                "write a small real Z-Image checkpoint",
                "promptdrop model demo demo/model",
            ),
            Command(
                "fetch",
                model.fetch,
                model.declare_fetch,
                "download weights ahead of time: the only command that uses the network",
                "promptdrop model fetch Tongyi-MAI/Z-Image-Turbo --to models/Z-Image-Turbo",
            ),
            Command(
                "path",
                model.path,
                model.declare_path,
                "print where weights resolve to",
                "promptdrop model path Tongyi-MAI/Z-Image-Turbo",
            ),
        ),
    ),
    Command(
        "schema",
        schema.schema,
        schema.declare_schema,
        "print a JSON Schema: of job files, sidecars, job.json or status --json",
        "promptdrop schema request",
    ),
    Command(
        "bench",
        bench.bench,
        bench.declare_bench,
        "time this configuration, images back to back",
        "promptdrop bench --images 20 --size 1024x1024",
    ),
)


def build() -> argparse.ArgumentParser:
    """Make the parser of the whole command line. `command` in its result is the function to run."""
    parser = terminal.Parser(
        prog="promptdrop",
        description="Drop prompt files into a folder, find images in another.",
        epilog="Start with: promptdrop init DIR, then promptdrop run --config DIR/config.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"promptdrop {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for entry in COMMANDS:
        if isinstance(entry, Command):
            description = f"{entry.about[:1].upper()}{entry.about[1:]}."
            _add(commands.add_parser, entry, description=description, allow_abbrev=False)
            continue
        group = commands.add_parser(entry.name, help=entry.about, allow_abbrev=False)
        actions = group.add_subparsers(metavar="ACTION", required=True)
        for action in entry.actions:
            _add(actions.add_parser, action)
    return parser


def _add(
    add_parser: Callable[..., argparse.ArgumentParser],
    command: Command,
    **more: str | bool,
) -> None:
    """Add a command's parser to those of its siblings; `more` is for ArgumentParser."""
    parser = add_parser(
        command.name,
        help=command.about,
        epilog="example:\n" + textwrap.indent(command.example, "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )
    parser.set_defaults(command=command.run)
    command.declare(parser)
