"""Write the reference pages of the documentation from the code: settings and command line.

``python docs/reference.py`` writes ``docs/settings.md`` and ``docs/command-line.md``; a test compares them.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embrag_ds.cli.main import COMMANDS, make_parser
from embrag_ds.config import EmbragConfig

HERE = Path(__file__).resolve().parent
SECTIONS = {
    "": "The run",
    "data": "Windows and samples",
    "masking": "Masks",
    "augmentation": "Errors put into training queries",
    "retrieval": "Retrieval",
    "model": "The network",
    "loss": "The loss",
    "train": "The loop",
    "validation": "Validation",
}
SETTINGS = """\
# Settings

Every key of our half of a configuration. It stands under `"embrag"` in the file, without that prefix here. Defaults
are given as JSON. Types are strict: a whole number passes for a number, and nothing else passes for anything else.
The page on [configuration](configuration.md) says how files are found, extended and overridden, and what DeepSpeed's
half needs.

This page is written by `python docs/reference.py` from the settings classes.
"""
COMMAND_LINE = """\
# Command line

One command, `embrag`, with a subcommand for each task. The scripts in `launch/` take the same options, and
`deepspeed launch/train.py` starts one process for each GPU. A fault of the input ends a command with one line and
status 2. Results go to standard output, progress and remarks to standard error.

This page is written by `python docs/reference.py` from the parsers.
"""


def settings_page() -> str:
    """The page of all settings."""
    # No table: on a narrow page its first column would break the keys within words.
    lists: dict[str, list[str]] = {name: [] for name in SECTIONS}
    for key, default, unit, effect in settings(EmbragConfig()):
        section = key.split(".")[0] if "." in key else ""
        lists[section].append(f"- `{key}` (default `{json.dumps(default)}`{unit and f', {unit}'}). {effect}")
    parts = [SETTINGS]
    for name, items in lists.items():
        parts.append(f"## {SECTIONS[name]}\n\n" + "\n".join(items))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, str]]:
    """(dotted key, default, unit, effect) of all settings; the last two are the docstring of the field.

    It reads ``[unit] Effect.``, or only the effect where there is no unit.
    """
    described = field_docstrings(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        key = prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{key}.")
            continue
        found = re.fullmatch(r"(?:\[(.+?)\] )?(.+)", described[field.name])
        assert found is not None
        yield key, json.loads(json.dumps(value)), found[1] or "", found[2].replace("``", "`")


def field_docstrings(kind: type) -> dict[str, str]:
    """The string behind each field of a class, on one line."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def command_line_page() -> str:
    """The page of all commands and their options."""
    parser = make_parser()
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    parts = [COMMAND_LINE]
    for name in COMMANDS:
        chosen = commands.choices[name]
        parts.append(
            f"## embrag {name}\n\n{chosen.description}\n\n```console\n{examples(COMMANDS[name].EXAMPLES)}\n```"
        )
        for group in chosen._action_groups:
            rows = [
                row(each)
                for each in group._group_actions
                if each.help != argparse.SUPPRESS and each.dest not in ("help", "help_all")
            ]
            if rows:
                title = (group.title or "").capitalize()
                parts.append(f"**{title}**\n\n| option | effect |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def examples(text: str) -> str:
    """Examples of a help text as commands with comments above them.

    There a comment follows its commands, indented further; a command goes on in the next line behind a backslash.
    """
    found: list[str] = []
    commands: list[str] = []
    for line in text.splitlines():
        if commands and commands[-1].endswith("\\"):
            commands.append(f"      {line.strip()}")
        elif line.startswith("      "):
            found += [f"# {line.strip()}", *commands]
            commands = []
        else:
            commands.append(f"$ {line.strip()}")
    return "\n".join(found + commands)


def row(option: argparse.Action) -> str:
    """A row of a table for an option or an argument."""
    value = str(option.metavar or "|".join(map(str, option.choices or ())))
    names = [*option.option_strings] or [value or option.dest]
    if option.option_strings and value and option.nargs != 0:
        names[-1] += f" {value}"
    effect = (option.help or "") % {"default": option.default, "prog": "embrag"}
    cells = ", ".join(f"`{name}`" for name in names), effect.replace("<", "&lt;")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PAGES = {"settings.md": settings_page, "command-line.md": command_line_page}

if __name__ == "__main__":
    for file, page in PAGES.items():
        (HERE / file).write_text(page(), encoding="utf-8")
