"""`completion`: scripts by which bash, zsh and fish know the commands and their options, made from the parser."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from polytrope.pipeline.errors import EXIT_SUCCESS
from polytrope.pipeline.stage import BUILTIN_STAGES


def completion(options: argparse.Namespace) -> int:
    """`polytrope completion`: print the script that the shell evaluates."""
    commands = _commands(options.parser)
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell](commands))
    return EXIT_SUCCESS


@dataclass(frozen=True)
class _Option:
    names: tuple[str, ...]
    summary: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class _Known:
    """A command: its options, and what its first argument may be, if that is one of a few words."""

    summary: str
    options: tuple[_Option, ...]
    words: tuple[str, ...]


def _commands(parser: argparse.ArgumentParser) -> dict[str, _Known]:
    (subparsers,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    summaries = {action.dest: action.help or "" for action in subparsers._choices_actions}
    known = {}
    for name, sub in subparsers.choices.items():
        sub.complete()
        actions = [action for action in sub._actions if action.help != argparse.SUPPRESS]
        options = [
            _Option(tuple(action.option_strings), action.help or "", tuple(map(str, action.choices or ())))
            for action in actions
            if action.option_strings
        ]
        words = [str(word) for action in actions if not action.option_strings for word in action.choices or ()]
        words += BUILTIN_STAGES if name == "stages" else ()  # besides functions of one's own
        known[name] = _Known(summaries[name], tuple(options), tuple(words))
    return known


def _bash(commands: dict[str, _Known]) -> str:
    """File names where nothing else fits; `polytrope completion bash` says how to load it."""
    cases = []
    for name, known in commands.items():
        lines = [
            f"        {name},{option}) words={shlex.quote(' '.join(item.choices))} ;;"
            for item in known.options
            if item.choices
            for option in item.names
        ]
        options = " ".join(option for item in known.options for option in item.names)
        cases += [
            *lines,
            f"        {name},*) options={shlex.quote(options)} words={shlex.quote(' '.join(known.words))} ;;",
        ]
    return "\n".join(
        [
            '# eval "$(polytrope completion bash)"',
            "_polytrope() {",
            '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" options="" words=""',
            '    if [ "$COMP_CWORD" -eq 1 ]; then',
            f"        options='--help --version' words={shlex.quote(' '.join(commands))}",
            "    else",
            '        case "${COMP_WORDS[1]},$previous" in',
            *cases,
            "        esac",
            "    fi",
            '    case "$current" in -*) words="$options" ;; esac',
            '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            "complete -o default -F _polytrope polytrope",
        ]
    )


def _zsh(commands: dict[str, _Known]) -> str:
    """zsh runs the functions of bash."""
    script = _bash(commands).partition("\n")[2]
    functions = (
        "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }; autoload -Uz bashcompinit && bashcompinit"
    )
    return f'# eval "$(polytrope completion zsh)"\n{functions}\n{script}'


def _fish(commands: dict[str, _Known]) -> str:
    def lines() -> Iterator[str]:
        yield "# polytrope completion fish | source"
        for name, known in commands.items():
            yield f"complete -c polytrope -n __fish_use_subcommand -f -a {name} -d {_fish_text(known.summary)}"
            inside = f"complete -c polytrope -n '__fish_seen_subcommand_from {name}'"
            if known.words:
                yield f"{inside} -f -a {_fish_text(' '.join(known.words))}"
            for item in known.options:
                names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in item.names)
                choices = f" -x -a {_fish_text(' '.join(item.choices))}" if item.choices else ""
                yield f"{inside} {names}{choices} -d {_fish_text(item.summary)}"

    return "\n".join(lines())


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
