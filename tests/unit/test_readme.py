"""The commands of README and of the pages under data/ are commands: every one parses."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from mdplug.cli import COMMANDS, _app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [(ROOT / "data" / name).read_text() for name in ("electrolyte.md", "bench/README.md")]
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
LINES = [
    part.strip()
    for block in BLOCKS
    for line in block.splitlines()
    for part in line.split("&&")
    if re.match(r"\s*(\S*/)?mdplug ", part)
]

# On the other pages: in backticks (over line ends, too), or a line of a code block.
LINES += [" ".join(found.split()) for page in PAGES for found in re.findall(r"(?<!`)`(mdplug [^`]+)`(?!`)", page)]
LINES += [
    part.strip()
    for page in PAGES
    for line in page.splitlines()
    if line.startswith("mdplug ")
    for part in line.split("&&")
]


@pytest.mark.parametrize("line", LINES)
def test_every_command_parses(line):
    name, *words = shlex.split(line, comments=True)[1:]
    assert name in COMMANDS
    typer.main.get_command(_app([name])).commands[name].make_context(name, words)


def test_negative_control():
    """An option that does not exist is noticed."""
    command = typer.main.get_command(_app(["md"])).commands["md"]
    with pytest.raises(Exception, match="No such option"):
        command.make_context("md", ["box.xyz", "--temperature", "300"])


def test_the_two_commands_are_there():
    for mark in ("<!-- job -->", "<!-- tests -->"):
        assert re.search(mark + r"\n```sh\n.+\n```", README)
    assert len(LINES) >= 8
