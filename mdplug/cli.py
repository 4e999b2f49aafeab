"""The command `mdplug`: a thin shell over the tasks. Options are the fields of each task's Config."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import typer
import yaml

from mdplug.errors import InputError, MdplugError


class Command(NamedTuple):
    """A task on the command line: its module, what it does, and the field that needs no option name."""

    module: str
    help: str
    positional: str | None = None


COMMANDS: dict[str, Command] = {
    "build": Command("mdplug.workflows.build", "Pack a liquid box from names or SMILES.", "composition"),
    "md": Command("mdplug.workflows.md", "Run molecular dynamics; the same command again goes on.", "structure"),
    "analyze": Command("mdplug.workflows.analyze", "Density, RDF, diffusion of a run, with error bars.", "run_folder"),
    "relax": Command("mdplug.workflows.relax", "Relax structures, and cells at a pressure.", "structures"),
    "singlepoint": Command("mdplug.workflows.singlepoint", "Energies, forces, stresses of structures.", "structures"),
    "label": Command("mdplug.workflows.label", "Reference labels by GFN-xTB or any ASE calculator.", "inputs"),
    "train": Command("mdplug.workflows.train", "Train a potential on labels.", "data"),
    "ensemble": Command("mdplug.workflows.ensemble", "Members on one body, or several models in one file.", "models"),
    "calibrate": Command(
        "mdplug.workflows.calibrate", "What sigma is worth: correct it, test it, write it back.", "data"
    ),
    "active": Command("mdplug.workflows.active", "MD that stops, asks and learns.", "structures"),
    "evaluate": Command("mdplug.workflows.evaluate", "Errors of a potential against labels.", "data"),
    "info": Command("mdplug.workflows.info", "What a model file holds.", "model"),
    "convert": Command("mdplug.workflows.convert", "An upstream MACE checkpoint -> a model file.", "checkpoint"),
    "export": Command("mdplug.workflows.export", "A model file -> TorchScript.", "model"),
    "bench": Command("mdplug.workflows.bench", "Time potentials and engines; JSON lines."),
    "bench-training": Command("mdplug.workflows.bench_training", "Time training beside mace-torch; JSON lines."),
    "bench-uncertainty": Command(
        "mdplug.workflows.bench_uncertainty", "Time what an ensemble costs in MD; JSON lines.", "model"
    ),
    "doctor": Command("mdplug.workflows.doctor", "What works here, and why not."),
}
SHORT = {"output": "-o", "model": "-m"}
SPELLED = {"target": "for"}  # a word that Python keeps for itself


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Errors are one line on stderr and exit code 2; `--debug` shows the traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not debug:
        warnings.showwarning = _warn
    try:
        _app(words)(words, prog_name="mdplug")
    except MdplugError as error:
        if debug:
            raise
        _say(str(error))
        sys.exit(int(getattr(error, "exit_code", 2)))
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where it can")
        sys.exit(130)
    except Exception as error:  # a fault of ours
        if debug:
            raise
        _say(f"{type(error).__name__}: {' '.join(str(error).split())} (a fault of mdplug; --debug shows where)")
        sys.exit(1)


def _say(text: str) -> None:
    sys.stderr.write(f"mdplug: {text}\n")


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
        _say(f"warning: {message}")


def _app(words: list[str]) -> typer.Typer:
    """The commands; only the one that is called is imported."""
    app = typer.Typer(
        help="Machine-learned potentials in OpenMM and ASE. Each command has --help; --debug shows tracebacks.",
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
    )

    @app.callback(invoke_without_command=True)
    def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
        if version:
            import mdplug

            typer.echo(mdplug.__version__)
            raise typer.Exit

    called = next((word for word in words if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        function = _command(name, command) if name == called else _stub
        app.command(name, help=command.help)(function)
    return app


def _stub() -> None:
    """Stands for a command that is not called."""


def _command(name: str, command: Command) -> Callable[..., None]:
    """A function whose parameters are the fields of the task's Config."""
    task = import_module(command.module)

    def function(**given: Any) -> None:
        from mdplug.workflows._common import live, read_config

        file = given.pop("config", None)
        values = {key: value for key, value in given.items() if value is not None and value != []}
        for key, field in task.Config.model_fields.items():
            if key in values and _kind(field.annotation)[2]:
                values[key] = _parsed(key, values[key])
        config = read_config(task.Config, file, values)
        with live(name) as progress:
            result = task.run(config, progress=progress)
        _report(result)
        code = int(getattr(result, "exit_code", 0))
        if code:
            raise typer.Exit(code)

    parameters = []
    for key, field in task.Config.model_fields.items():
        parameters.append(_parameter(key, field, command.positional))
    parameters.append(
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Option(None, "--config", help="YAML file of options; those given here win"),
            annotation=Path | None,
        )
    )
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {one.name: one.annotation for one in parameters}
    return function


def _parameter(key: str, field: Any, positional: str | None) -> inspect.Parameter:
    kind, many, as_yaml, choices = _kind(field.annotation)
    text = field.description or key.replace("_", " ")
    if not field.is_required() and field.default not in (None, (), [], {}) and field.default_factory is None:
        text += f" [default: {field.default}]"
    extra: dict[str, Any] = {"help": text, "show_default": False}
    if choices:
        extra["metavar"] = "|".join(choices)
    if as_yaml:
        extra["metavar"] = "YAML"
    if key == positional:
        default = typer.Argument(None, **extra)
    else:
        word = SPELLED.get(key, key)
        names = [f"--{word}/--no_{word}" if kind is bool else f"--{word}"]
        default = typer.Option(None, *([SHORT[key]] if key in SHORT else []), *names, **extra)
    annotation: Any = list[kind] if many else kind  # type: ignore[valid-type]
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation | None)


def _kind(annotation: Any) -> tuple[type, bool, bool, tuple[str, ...]]:
    """(type of one value, whether many, whether YAML text, choices) of a field."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        rest = [one for one in inside if one is not type(None)]
        if len(rest) == 1:
            return _kind(rest[0])
        return str, False, True, ()
    if origin is typing.Annotated:
        return _kind(inside[0])
    if origin is Literal:
        return str, False, False, tuple(str(one) for one in inside)
    if origin in (list, tuple, set, frozenset) and inside:
        kind, many, as_yaml, choices = _kind(inside[0])
        if many or (origin is tuple and inside[-1] is not Ellipsis):
            return str, False, True, ()
        return kind, True, as_yaml, choices
    if annotation in (str, int, float, bool, Path):
        return annotation, False, False, ()
    return str, False, True, ()


def _parsed(key: str, value: Any) -> Any:
    try:
        return [yaml.safe_load(one) for one in value] if isinstance(value, list) else yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--{key}: not YAML ({' '.join(str(error).split())})") from error


def _report(result: Any) -> None:
    """What a task gave, a line each: its own text, or its fields that are short."""
    if result is None:
        return
    if not dataclasses.is_dataclass(result) or "__str__" in vars(type(result)):
        typer.echo(str(result))
        return
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, float):
            typer.echo(f"{field.name}: {value:.6g}")
        elif isinstance(value, str | int | Path) or (isinstance(value, dict) and len(str(value)) < 200):
            typer.echo(f"{field.name}: {value}")


if __name__ == "__main__":
    main()
