"""The command line. Each command imports what it needs when it runs: `--help` stays instant."""

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptdrop import __version__
from promptdrop.errors import PromptdropError, UsageError
from promptdrop.fields import OPTIONS

if TYPE_CHECKING:
    from promptdrop.cli.client import Dropped
    from promptdrop.config import Config
    from promptdrop.spool.spool import Spool


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status, errors are a line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments) or 0)
    except PromptdropError as e:
        _complain(str(e))
        return e.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `promptdrop status | head`
        return 0
    except OSError as e:
        _complain(f"{e.filename or ''}: {e.strerror or e}")
        return 1
    except KeyboardInterrupt:
        return 130


def _complain(text: str) -> None:
    """What it names may have been named to harm a terminal."""
    from promptdrop import names

    lines = "\n".join(names.printable(line) for line in text.split("\n"))
    print(f"promptdrop: {lines}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="promptdrop",
        description="Drop prompt files into a folder, find images in another.",
        epilog="Start with: promptdrop init DIR, then promptdrop run --config DIR/config.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"promptdrop {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str,
        function: Callable[[argparse.Namespace], int | None],
        about: str,
        example: str,
        configured: bool = True,
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=about,
            description=about[:1].upper() + about[1:] + ".",
            epilog="example:\n" + textwrap.indent(example, "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(command=function)
        if configured:
            command.add_argument(
                "--config",
                type=Path,
                metavar="FILE",
                help="default: $PROMPTDROP_CONFIG, ./config.yaml, /etc/promptdrop/config.yaml",
            )
        return command

    init = add(
        "init",
        _init,
        "write a commented config.yaml and the spool's folders; overwrite nothing",
        "promptdrop init ~/promptdrop --model /models/Z-Image-Turbo",
        configured=False,
    )
    init.add_argument("directory", type=Path, metavar="DIR")
    init.add_argument("--model", metavar="PATH_OR_ID", help="a model directory, or a hub's id")

    run = add(
        "run",
        _run,
        "run the daemon in the foreground",
        "promptdrop run --config ~/promptdrop/config.yaml --drain",
    )
    run.add_argument(
        "--drain", action="store_true", help="finish what is in the inbox, print a table, and stop"
    )

    generate = add(
        "generate",
        _generate,
        "render images now, through the running daemon if there is one",
        'promptdrop generate "a red fox in the snow" -o fox.png --seed 7\npromptdrop generate --prompts "cat;dog;robot" --output pets/',
    )
    generate.add_argument("prompt", nargs="?", metavar="PROMPT")
    generate.add_argument(
        "--prompts", metavar="A;B;C", help="several prompts, separated by semicolons"
    )
    generate.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="a file for one image, a folder for several",
    )
    generate.add_argument(
        "--own-engine", action="store_true", help="load a model even if a daemon runs"
    )
    _add_fields(generate)

    submit = add(
        "submit",
        _submit,
        "put jobs into the inbox in one step",
        'promptdrop submit prompts.txt --wait\npromptdrop submit --prompt "a lighthouse" --size 16:9 --count 4',
    )
    submit.add_argument("files", nargs="*", type=Path, metavar="FILE")
    submit.add_argument(
        "--prompt",
        action="append",
        default=[],
        dest="prompts",
        metavar="TEXT",
        help="a job of its own; may be given again",
    )
    submit.add_argument("--folder", default="", metavar="SUB", help="sub-folder of the inbox")
    submit.add_argument(
        "--wait", action="store_true", help="until the jobs have ended; the exit status is theirs"
    )
    _add_fields(submit)

    check = add(
        "check",
        _check,
        "show what job files ask for, or why they would be refused",
        "promptdrop check prompts.yaml",
    )
    check.add_argument("files", nargs="+", type=Path, metavar="FILE")

    status = add(
        "status",
        _status,
        "show the engine, the queue, rates and what waits",
        "promptdrop status --watch",
    )
    status.add_argument("--json", action="store_true", dest="as_json")
    status.add_argument("--watch", action="store_true", help="until interrupted")

    retry = add(
        "retry",
        _retry,
        "resume failed jobs: only the images that are missing",
        "promptdrop retry cats/prompts.txt",
    )
    retry.add_argument("names", nargs="*", metavar="NAME", help="a job id, SUB/FILE or SUB/JOB")
    retry.add_argument("--all", action="store_true", dest="everything")
    cancel = add(
        "cancel",
        _cancel,
        "withdraw a pending job, or stop an active one at its next step",
        "promptdrop cancel prompts.txt",
    )
    cancel.add_argument("names", nargs="+", metavar="NAME", help="a job id, SUB/FILE or SUB/JOB")
    add("pause", _pause, "stop taking new images, across restarts", "promptdrop pause")
    add("resume", _resume, "take images again", "promptdrop resume")
    add(
        "doctor",
        _doctor,
        "check the configuration, folders, model, device and disk",
        "promptdrop doctor --config config.yaml",
    )

    cluster = commands.add_parser(
        "cluster", help="the hosts of engine.backend: ray, and what they do", allow_abbrev=False
    )
    actions = cluster.add_subparsers(metavar="ACTION", required=True)
    for name, command, text in (
        ("status", _cluster_status, "show hosts, GPUs, engines and what each renders"),
        ("release", _cluster_release, "end the engines that a stopped daemon left warm"),
    ):
        action = actions.add_parser(
            name,
            help=text,
            epilog=f"example:\n  promptdrop cluster {name}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        action.add_argument("--config", type=Path, metavar="FILE")
        action.set_defaults(command=command)

    model = commands.add_parser(
        "model",
        help="write the demonstration model, fetch weights, say where they are",
        allow_abbrev=False,
    )
    kinds = model.add_subparsers(metavar="ACTION", required=True)
    demo = kinds.add_parser(
        "demo",
        help="write a small real Z-Image checkpoint",
        epilog="example:\n  promptdrop model demo demo/model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("directory", type=Path, metavar="DIR")
    demo.set_defaults(command=_model_demo)
    fetch = kinds.add_parser(
        "fetch",
        help="download weights ahead of time: the only command that uses the network",
        epilog="example:\n  promptdrop model fetch Tongyi-MAI/Z-Image-Turbo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fetch.add_argument("id", metavar="ID")
    fetch.add_argument("--hub", choices=("modelscope", "huggingface"), default="modelscope")
    fetch.add_argument("--revision")
    fetch.set_defaults(command=_model_fetch)
    where = kinds.add_parser(
        "path",
        help="print where weights resolve to",
        epilog="example:\n  promptdrop model path Tongyi-MAI/Z-Image-Turbo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where.add_argument("id", metavar="ID")
    where.add_argument("--hub", choices=("modelscope", "huggingface"), default="modelscope")
    where.add_argument("--revision")
    where.set_defaults(command=_model_path)

    schema = add(
        "schema",
        _schema,
        "print a JSON Schema: of job files, sidecars, job.json or status --json",
        "promptdrop schema request",
        configured=False,
    )
    schema.add_argument("what", choices=("request", "image", "job", "status"))

    bench = add(
        "bench",
        _bench,
        "time this configuration, images back to back",
        "promptdrop bench --images 20 --size 1024x1024",
    )
    bench.add_argument("--images", type=int, default=10, metavar="N")
    bench.add_argument("--size", metavar="WxH")
    return parser


def _add_fields(parser: argparse.ArgumentParser) -> None:
    for name, field in OPTIONS.items():
        spellings = {f"--{name.replace('_', '-')}", f"--{name}"}
        kind = field.kind.__name__.upper()
        parser.add_argument(
            *sorted(spellings), dest=name, type=field.kind, help=field.option, metavar=kind
        )


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}


def _config(arguments: argparse.Namespace) -> "Config":
    from promptdrop import config_file

    return config_file.load(arguments.config or config_file.default_file())


def _spool(arguments: argparse.Namespace) -> "Spool":
    from promptdrop.spool.spool import Spool

    return Spool(_config(arguments))


# --- commands -----------------------------------------------------------------------------------


def _init(arguments: argparse.Namespace) -> None:
    from importlib import resources

    from promptdrop import config_file
    from promptdrop.spool.spool import Spool

    directory: Path = arguments.directory
    file = directory / "config.yaml"
    directory.mkdir(parents=True, exist_ok=True)
    if file.exists():
        print(f"kept   {file}" + (", so --model says nothing new" if arguments.model else ""))
    else:
        template = resources.files("promptdrop").joinpath("config.yaml").read_text("utf-8")
        file.write_text(_with_model(template, arguments.model), "utf-8")
        print(f"wrote  {file}")
    spool = Spool(config_file.load(file))
    spool.folders.init()
    for path in (spool.paths.inbox, spool.paths.outbox, spool.paths.failed):
        print(f"folder {path}")
    print(f"next   promptdrop doctor --config {file}; promptdrop run --config {file}")


def _with_model(template: str, model: str | None) -> str:
    """The template with `model.path` and its size for a directory, `model.id` for a hub's id."""
    from promptdrop import weights

    values: dict[str, Any] = {} if model is None else {"id": model}
    if model and (Path(model).is_dir() or model.startswith(("/", ".", "~"))):
        path = Path(model).expanduser().resolve()
        values = {"id": path.name, "path": str(path)}
        if side := weights.side_of(path):
            values |= {"warmup": [f"{side}x{side}"], "width": side, "height": side}
    for key, value in values.items():
        template = _with_value(template, key, value)
    return template


def _with_value(template: str, key: str, value: Any) -> str:
    """The template with another value in a key's first line, the comment kept in its column."""

    def line(found: re.Match[str]) -> str:
        given, comment = f"{found[1]}{json.dumps(value, ensure_ascii=False)}  ", found[3] or ""
        return (given.ljust(len(found[1] + found[2])) + comment).rstrip()

    return re.sub(rf"^(  {key}: )([^#\n]*)(#.*)?$", line, template, count=1, flags=re.MULTILINE)


def _run(arguments: argparse.Namespace) -> int:
    from promptdrop import log
    from promptdrop.cli import terminal
    from promptdrop.supervisor.supervisor import Supervisor

    settings = _config(arguments)
    log.set_up(settings.log.level, settings.log.format)
    with terminal.progress_bar() if arguments.drain else terminal.no_bar() as bar:
        supervisor = Supervisor(settings, arguments.drain, bar.show if bar else None)
        status = supervisor.run()
    if arguments.drain:
        _print_results(supervisor)
    return status


def _print_results(supervisor: Any) -> None:
    """What a drain has made: a row an image, and where to look."""
    from promptdrop.cli import client, terminal

    rows = []
    for end in supervisor.finished:
        for file, sidecar in client.pictures(supervisor.spool, end.folder) if end.folder else ():
            render = sidecar["latency_ms"]["render"]
            rows.append(
                (
                    f"{end.file} {sidecar['job']['image']}/{sidecar['job']['images']}",
                    str(sidecar["request"]["seed"]),
                    f"{render:.0f} ms" if render is not None else sidecar["outcome"],
                    os.path.relpath(file),
                )
            )
    if rows:
        terminal.table(("image", "seed", "latency", "file"), rows)
    for end in supervisor.finished:
        if end.outcome != "done":
            terminal.say(f"{end.outcome}: {end.file}: {end.error}")
    count = "1 image" if len(rows) == 1 else f"{len(rows)} images"
    terminal.say(
        f"{count} in {os.path.relpath(supervisor.spool.paths.outbox)}, each beside its sidecar"
    )


def _generate(arguments: argparse.Namespace) -> int:
    from promptdrop.cli import generate

    prompts = _prompts(arguments)
    fields = _fields(arguments)
    settings = _config(arguments)
    output = Path(arguments.output) if arguments.output else None
    if output and arguments.output.endswith(os.sep):
        output.mkdir(parents=True, exist_ok=True)
    return generate.run(
        settings,
        prompts,
        fields,
        output,
        arguments.prompts is not None,
        arguments.own_engine,
    )


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise UsageError('expected one prompt, or several as --prompts "cat;dog"')
    if arguments.prompt is not None:
        return [arguments.prompt]
    prompts = [prompt.strip() for prompt in arguments.prompts.split(";") if prompt.strip()]
    if not prompts:
        raise UsageError(
            f"--prompts {arguments.prompts!r}: expected prompts separated by semicolons"
        )
    return prompts


def _submit(arguments: argparse.Namespace) -> int:
    from promptdrop import names
    from promptdrop.cli import client, terminal

    if not arguments.files and not arguments.prompts:
        raise UsageError("expected a FILE or --prompt TEXT")
    fields = _fields(arguments)
    if fields and not arguments.prompts:
        raise UsageError(f"--{next(iter(fields))} goes with --prompt; a FILE says it inside")
    spool = _spool(arguments)
    if arguments.folder and not spool.config.inbox.recursive:
        raise UsageError("--folder: inbox.recursive is false, so sub-folders are not taken")
    for file in arguments.files:
        if not names.is_job_name(file.name):
            raise UsageError(
                f"{file}: not a job file's name; expected one of {' '.join(names.JOB_SUFFIXES)}"
            )
    jobs = [(file.read_bytes(), file.name) for file in arguments.files]
    for prompt in arguments.prompts:
        data = json.dumps({"prompt": prompt, **fields}).encode()
        jobs.append((data, client.name_of_prompt(prompt)))
    dropped = [client.drop(spool, data, name, _sub(arguments.folder)) for data, name in jobs]
    for one in dropped:
        terminal.say(f"submitted {names.printable(one.path)}")
    return _wait(spool, dropped) if arguments.wait else 0


def _sub(folder: str) -> str:
    from promptdrop import names

    parts = Path(folder).parts
    if any(map(names.is_ignored_folder, parts)):
        raise UsageError(f"--folder {folder}: the daemon never enters a folder of this name")
    if ".." in parts or Path(folder).is_absolute():
        raise UsageError(f"--folder {folder}: expected a sub-folder of the inbox")
    return "/".join(parts)


def _wait(spool: "Spool", drops: list["Dropped"]) -> int:
    """Show the jobs' progress; returns their worst outcome as an exit status."""
    from promptdrop import names
    from promptdrop.cli import client, terminal

    with terminal.progress_bar() as bar:
        ends = client.wait(spool, drops, terminal.Follower(bar))
    for one, end in zip(drops, ends, strict=True):
        where = f" {spool.paths.outbox / end.folder}" if end.folder else ""
        error = f": {end.error}" if end.error else ""
        terminal.say(f"{end.outcome} {names.printable(one.path)}{where}{error}")
    return int(any(end.outcome != "done" for end in ends))


def _settings_for(file: Path, settings: "Config") -> "Config":
    """With the presets of its folder, for a file that lies in the inbox."""
    inbox, folder = (settings.spool / "inbox").resolve(), file.parent.resolve()
    inside = folder.is_relative_to(inbox)
    return settings.in_folder(str(folder.relative_to(inbox))) if inside else settings


def _check(arguments: argparse.Namespace) -> int:
    from promptdrop import config, names
    from promptdrop.cli import terminal
    from promptdrop.errors import ConfigError, RequestError
    from promptdrop.intake.reading import read_job_file

    try:
        settings = _config(arguments)
    except ConfigError:
        if arguments.config or os.environ.get("PROMPTDROP_CONFIG"):
            raise
        settings = config.parse({"model": {"id": "default"}})  # checking needs no installation
    refused, rows = False, []
    for file in arguments.files:
        result = read_job_file(file, file.name, _settings_for(file, settings), None)
        if result is None:
            result = RequestError("no such regular file")
        if isinstance(result, RequestError):
            refused = True
            for problem in result.problems:
                terminal.complain(
                    f"{names.printable(str(file))}:{problem.line or 1}: {problem.message}"
                )
            continue
        for spec in result.images:
            rows.append(
                (
                    f"{names.printable(file.name)} {spec.image}/{len(result.images)}",
                    f"{spec.width}x{spec.height}",
                    str(spec.steps),
                    "of the job's id" if spec.seed is None else str(spec.seed),
                    _short(spec.prompt),
                )
            )
    if rows:
        terminal.table(("image", "size", "steps", "seed", "prompt"), rows)
    return int(refused)


def _short(text: str, limit: int = 70) -> str:
    from promptdrop import names

    line = names.printable(text.replace("\n", " "))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _status(arguments: argparse.Namespace) -> int:
    import time

    from promptdrop.cli import client, terminal

    spool = _spool(arguments)
    while True:
        status = client.read_status(spool)
        if status is None:
            run = (
                f"promptdrop run --config {arguments.config}"
                if arguments.config
                else "promptdrop run"
            )
            terminal.complain(f"no daemon runs on {spool.paths.root}; start it with: {run}")
            return 1
        if arguments.watch and terminal.is_terminal():
            print("\033[H\033[2J", end="")
        if arguments.as_json:
            terminal.say(
                json.dumps(status, ensure_ascii=False, indent=None if arguments.watch else 1)
            )
        else:
            terminal.status(status)
        if not arguments.watch:
            return 0
        time.sleep(1)


def _cluster_config(arguments: argparse.Namespace) -> "Config":
    """Raises ConfigError: no cluster is configured, or ray is missing."""
    from promptdrop.cluster.backend import require_ray
    from promptdrop.errors import ConfigError

    settings = _config(arguments)
    if settings.engine.backend != "ray":
        raise ConfigError("engine.backend: process: no cluster is configured; expected ray")
    require_ray()
    return settings


def _cluster_status(arguments: argparse.Namespace) -> None:
    from promptdrop.cli import client, terminal
    from promptdrop.spool.spool import Spool

    settings = _cluster_config(arguments)
    from promptdrop.cluster import view  # imports ray

    nodes = view.nodes(settings.ray.address)
    document = client.read_status(Spool(settings))
    terminal.cluster(nodes, document["engines"] if document else [])
    if document is None:
        terminal.complain("no daemon runs on this spool")


def _cluster_release(arguments: argparse.Namespace) -> None:
    from promptdrop.cli import terminal
    from promptdrop.cluster.backend import actor_prefix
    from promptdrop.spool.spool import Spool

    settings = _cluster_config(arguments)
    if (pid := Spool(settings).lock.daemon_pid()) is not None:
        raise UsageError(f"a daemon runs on this spool (pid {pid}) and uses its engines; stop it")
    from promptdrop.cluster import view  # imports ray

    count = view.release(settings.ray.address, actor_prefix(settings.state))
    terminal.say(f"{count} engine{'s' * (count != 1)} released")


def _retry(arguments: argparse.Namespace) -> None:
    from promptdrop.cli import client, terminal
    from promptdrop.spool import control

    spool = _spool(arguments)
    if arguments.everything == bool(arguments.names):
        raise UsageError("expected a NAME, or --all")
    if arguments.everything:
        found = client.find_failed(spool, None)
        if not found:
            terminal.say("nothing has failed")
            return
    else:
        found = [
            client.only(client.find_failed(spool, name), name, "in failed/")
            for name in arguments.names
        ]
    control.send(spool.paths.control, control.Retry(tuple(match.target for match in found)))
    _say_sent(spool, "retrying", found)


def _cancel(arguments: argparse.Namespace) -> None:
    from promptdrop.cli import client
    from promptdrop.spool import control

    spool = _spool(arguments)
    found = [
        client.only(client.find_unfinished(spool, name), name, "in hand")
        for name in arguments.names
    ]
    control.send(spool.paths.control, control.Cancel(tuple(match.target for match in found)))
    _say_sent(spool, "cancelling", found)


def _say_sent(spool: "Spool", verb: str, found: list[Any]) -> None:
    from promptdrop.cli import terminal

    for match in found:
        terminal.say(f"{verb} {match.description}")
    if spool.lock.daemon_pid() is None:
        terminal.complain("no daemon runs on this spool; it is done when one starts")


def _pause(arguments: argparse.Namespace) -> None:
    from promptdrop.spool import control

    control.pause(_spool(arguments).paths.control)
    print("paused: no new image is begun until `promptdrop resume`")


def _resume(arguments: argparse.Namespace) -> None:
    from promptdrop import fs, names
    from promptdrop.spool import control

    spool = _spool(arguments)
    was_paused = control.why_paused(spool.paths) is not None
    control.resume(spool.paths.control)
    fs.remove_file(spool.paths.inbox / names.PAUSE)
    print("resumed" if was_paused else "was not paused")


def _doctor(arguments: argparse.Namespace) -> int:
    from promptdrop.cli import doctor, terminal

    bad = False
    for finding in doctor.examine(_config(arguments)):
        bad = bad or finding.grade == "bad"
        terminal.finding(finding.grade, finding.what, finding.text)
    return int(bad)


def _model_demo(arguments: argparse.Namespace) -> None:
    from promptdrop import weights

    weights.copy_demo(arguments.directory)
    print(
        f"wrote {arguments.directory}; use it with: promptdrop init DIR --model {arguments.directory}"
    )


def _model_fetch(arguments: argparse.Namespace) -> None:
    from promptdrop import weights

    print(weights.fetch(arguments.id, arguments.hub, arguments.revision))


def _model_path(arguments: argparse.Namespace) -> None:
    from promptdrop import config, weights

    model = {"id": arguments.id, "hub": arguments.hub, "revision": arguments.revision}
    print(weights.require(config.parse({"model": model})))


def _schema(arguments: argparse.Namespace) -> None:
    from promptdrop import records
    from promptdrop.request.schema import request_schema

    if arguments.what == "request":
        schema = request_schema()
    else:
        schema = records.SCHEMAS[arguments.what].model_json_schema(
            by_alias=True, mode="serialization"
        )
    print(json.dumps(schema, indent=2))


def _bench(arguments: argparse.Namespace) -> None:
    from promptdrop.cli import bench

    bench.run(_config(arguments), arguments.images, arguments.size)
