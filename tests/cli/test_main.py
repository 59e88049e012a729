"""``embrag`` as its console script runs it: its help, what every command has, and a run's logs."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embrag_ds import __version__
from embrag_ds.cli.main import COMMANDS, main, make_parser
from embrag_ds.data.simulate import DefaultData

Embrag = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def ended(*arguments: str) -> int:
    """Status with which ``embrag`` ends in this process."""
    with pytest.raises(SystemExit) as end:
        main(arguments=arguments)
    return int(end.value.code or 0)


def sections(text: str) -> dict[str, str]:
    """A help text's sections by their titles."""
    parts = re.split(r"^(\S.*):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def examples(name: str) -> list[list[str]]:
    """The commands of a help text's examples, in words."""
    lines = re.sub(r"\\\n\s*", "", COMMANDS[name].EXAMPLES).splitlines()
    return [shlex.split(line) for line in lines if re.match(r"  \S", line)]


def test_the_console_script_is_this_function(root: Path) -> None:
    assert '"embrag = embrag_ds.cli.main:main"' in (root / "setup.py").read_text()
    assert main.__module__ == "embrag_ds.cli.main"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("--help") == 0
    commands = sections(capsys.readouterr().out)["commands"]
    for name, command in COMMANDS.items():
        assert re.search(rf"^ +{name} ", commands, flags=re.MULTILINE)
        assert command.DESCRIPTION.split()[0] in commands


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_has_its_options_in_groups_and_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(name, "--help-all") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: embrag {name} {COMMANDS[name].USAGE} [options]\n")
    assert COMMANDS[name].DESCRIPTION in said
    found = sections(said)
    (commands,) = (each for each in make_parser()._actions if each.dest == "==SUPPRESS==" or each.choices)
    own = commands.choices[name]._actions
    assert all([*each.option_strings, each.metavar][0] in said for each in own if each.help != argparse.SUPPRESS)
    assert all(option in found["general"] for option in ("--help", "--verbose", "--debug", "--version"))
    assert len(found) >= 4 and COMMANDS[name].EXAMPLES.strip() in found["examples"]
    assert "==SUPPRESS==" not in said and "None" not in said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_fits_a_screen(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert ended(name, "--help") == 0
    said = capsys.readouterr().out
    assert said.count("\n") <= 50
    rare = getattr(COMMANDS[name], "RARE", ())
    assert ("--help-all" in said) == bool(rare) and not [each for each in rare if f"{each} " in said]
    assert ended(name, "--help-all") == 0
    everything = capsys.readouterr().out
    assert rare or everything == said
    assert all(f"  {each}" in everything for each in rare)
    first = COMMANDS[name].EXAMPLES.splitlines()[0]
    assert first in said and "examples:" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_commands(name: str) -> None:
    given = examples(name)
    assert len(given) >= 2
    for words in given:
        if words[:2] == ["deepspeed", f"launch/{name}.py"]:
            words = ["embrag", name, *words[2:]]
        assert words[:2] == ["embrag", name]
        options = make_parser().parse_args(words[1:])
        assert options.run is COMMANDS[name].run and not options.verbose and not options.debug


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_version(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(*command, "--version") == 0
    assert capsys.readouterr().out == f"embrag_ds {__version__}\n"


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("inpute") == 2
    said = capsys.readouterr().err
    assert "invalid choice: 'inpute'" in said and all(name in said for name in COMMANDS)
    assert ended() == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "evaluate --bootstrp=10",
            "unknown option --bootstrp (--bootstrap?); embrag evaluate --help lists the options",
        ),
        ("evaluate --boot 10", "unknown option --boot (--bootstrap?); embrag evaluate --help lists the options"),
        ("impute --panell A", "unknown option --panell (--panel?); embrag impute --help-all lists the options"),
        (
            "train --deepspeed-config v18",
            "unknown option --deepspeed-config (--deepspeed_config?); embrag train --help",
        ),
        ("evaluate --ex", "unknown option --ex (--excluded?); embrag evaluate --help lists the options"),
        ("evaluate --zzzz", "unknown option --zzzz; embrag evaluate --help lists the options"),
        ("evaluate -z 3", "unknown option -z; embrag evaluate --help lists the options"),
        ("evaluate -- A", "unknown argument A; embrag evaluate --help lists the options"),
        ("report A B", "unknown argument B; embrag report --help lists the options"),
        ("--zzzz evaluate", "unknown option --zzzz; embrag --help lists the commands"),
        ("--vers", "unknown option --vers (--version?); embrag --help lists the commands"),
        ("evaluate --bootstrap=many", "argument --bootstrap: invalid int value: 'many'; embrag evaluate --help lists"),
        ("report", "the following arguments are required: INPUT; embrag report --help lists the options"),
    ],
)
def test_a_faulty_command_line_is_one_line(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(*given.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith(f"error: {said}")


def test_no_argument_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("evaluate", "two words") == 2
    assert capsys.readouterr().err.startswith("error: unknown argument two words; ")
    given = make_parser().parse_args(["evaluate", "--imputed", "--a b"])
    assert given.imputed == ["--a b"]
    assert str(make_parser().parse_args(["report", "--", "--odd"]).input) == "--odd"


def test_verbose_says_more(simulated: DefaultData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--panel={simulated.panel}", f"--target={simulated.target}", f"--map={simulated.genetic_map}"]
    said = []
    for more in ([], ["-v"]):
        main(arguments=["impute", "--adapt=off", *files, f"--out={tmp_path / 'out.vcf.gz'}", *more])
        said.append(capsys.readouterr())
    plain, verbose = (each.err for each in said)
    assert [each.out for each in said] == ["", ""]
    version = f"embrag_ds {__version__}, Python "
    assert version in verbose and version not in plain


def test_debug_shows_where_a_fault_of_the_users_was_found(embrag: Embrag, tmp_path: Path) -> None:
    fault = ["simulate", "--out", tmp_path / "sim", "--panel-samples=2"]
    plain = embrag(*fault)
    assert plain.returncode == 2 and plain.stderr == "error: --panel-samples must be at least 3\n"
    shown = embrag(*fault, "--debug")
    assert shown.returncode != 0 and shown.stderr.startswith("Traceback ")
    assert shown.stderr.endswith("UserError: --panel-samples must be at least 3\n")
