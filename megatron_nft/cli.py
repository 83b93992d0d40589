"""The command line: `megatron-nft COMMAND`, one table of commands, and their exit status.

Only argparse and the settings are imported here; a command imports what it needs when it runs, so `--help` is quick.
Exit statuses: 0 done, 1 error, 2 bad usage or settings, 75 saved and to be run again, 130 interrupted and saved.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from megatron_nft import __version__


class Command(Protocol):
    """A module of a command: `command.py` of a package, or `NAME_command.py` where a package has several."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of the command."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; return the exit status."""


_PACKAGE = Path(__file__).parent
_format_of_python = warnings.formatwarning

# name -> (module of the command, one-line help)
COMMANDS = {
    "train": ("megatron_nft.train.command", "train a model with NFT or one of the baselines"),
    "eval": ("megatron_nft.evaluate.command", "evaluate a model on maths benchmarks"),
    "compare": ("megatron_nft.evaluate.compare_command", "is B better than A? two evaluations, paired"),
    "grade": ("megatron_nft.verify.command", "grade responses in a JSONL or parquet file"),
    "plan": ("megatron_nft.plan.command", "check memory, time and layout of a run before it is queued"),
    "doctor": ("megatron_nft.plan.doctor.command", "check nodes and environments before a run starts on them"),
    "report": ("megatron_nft.report.command", "write one HTML page about a run"),
    "convert": ("megatron_nft.weights.offline.convert_command", "convert weights between Hugging Face and Megatron"),
    "reshard": ("megatron_nft.weights.offline.reshard_command", "change the layout of a training checkpoint"),
    "diff": ("megatron_nft.weights.offline.diff_command", "compare two sets of weights, tensor by tensor"),
    "prepare": ("megatron_nft.data.prepare_command", "turn a public question set into a file for train and eval"),
    "download": ("megatron_nft.data.download_command", "download the published models and data sets, checked"),
}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the chosen command's module is imported, for its options."""
    parser = argparse.ArgumentParser(
        prog="megatron-nft", description="Negative-aware Fine-Tuning (arXiv 2505.18116) on Megatron-Core."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            _command(module).add_arguments(sub)
    return parser


def _command(module: str) -> Command:
    return cast(Command, importlib.import_module(module))


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings about settings and names, which are for the user, as one plain line; others as Python does."""
    if issubclass(category, FutureWarning) and Path(filename).is_relative_to(_PACKAGE):
        return f"megatron-nft: {message}\n"
    return _format_of_python(message, category, filename, lineno, line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    warnings.formatwarning = _format_warning
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if word in COMMANDS), None)
    args = build_parser(command).parse_args(argv)
    # A console script does not put the working directory on the path, `python -m` does;
    # graders named by dotted path are looked up there in both.
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return _command(COMMANDS[args.command][0]).run(args)
    except BrokenPipeError:  # the reader of our output left, as in `megatron-nft plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def main_of(command: Command, doc: str) -> int:
    """Run one command as a program of its own, as the files of tools/ do; `doc` is that file's docstring.

    Its first line is the description that `--help` shows.
    """
    warnings.formatwarning = _format_warning
    parser = argparse.ArgumentParser(description=doc.strip().partition("\n")[0])
    command.add_arguments(parser)
    return command.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
