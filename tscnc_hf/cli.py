"""`tscnc`: one command for what needs no script. Thin, calls the rooms."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tscnc_hf import __version__


USAGE = """\
usage: tscnc COMMAND [options]

  tscnc evaluate --model FOLDER_OR_HUB_ID    clean and robust accuracy of any image classifier

  tscnc COMMAND --help     the options of a command
  tscnc --version
"""


def _evaluate(args: Sequence[str]) -> None:
    from tscnc_hf.training.evaluating import evaluate_model, parse

    evaluate_model(parse(args, prog="tscnc evaluate"))


COMMANDS = {"evaluate": _evaluate}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command named first; exit code 2 and the usage where there is none of that name."""
    command, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"tscnc-hf {__version__}")
    elif command in COMMANDS:
        COMMANDS[command](rest)
    else:
        print(
            f"tscnc: {command!r} is no command; use one of {', '.join(COMMANDS)}\n\n{USAGE}", file=sys.stderr, end=""
        )
        raise SystemExit(2)


if __name__ == "__main__":
    main()
