"""`megatron-nft download`: published models and data sets, each file checked against the hub's checksum."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_nft.arguments import describe
from megatron_nft.data.download import SOURCES, DownloadError, RemoteFile, Source, fetch, list_files
from megatron_nft.files import write_atomically

DETAILS = """
    %(prog)s qwen2.5-math-7b dapo-math-17k validation --to data
    %(prog)s qwen2.5-math-7b --part tokenizer --to data
    %(prog)s nft-7b --to data --dry-run

Only safetensors, parquet and text files are taken, never a pickle. An interrupted download goes on with the files that
are not complete; those that are there are checked again. Every folder gets a SHA256SUMS file for `sha256sum -c`.
HF_TOKEN, HF_ENDPOINT and the other variables of huggingface_hub are honoured.

names:
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    names = "\n".join(f"  {name:16} {s.kind} {s.repo} -> {s.folder}" for name, s in SOURCES.items())
    describe(parser, DETAILS + names)
    parser.add_argument("names", nargs="+", choices=SOURCES, metavar="NAME", help="what to download (see below)")
    parser.add_argument("--to", type=Path, default=Path("data"), help="folder to download into (default: data)")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--part", choices=("all", "tokenizer"), default="all", help="all, or just tokenizer and config")
    parser.add_argument("--dry-run", action="store_true", help="show files, sizes and checksums; download nothing")


def run(args: argparse.Namespace) -> int:
    """Download and check; return 0 where every file is as the hub says, 1 with one line where not."""
    console = Console()
    try:
        for name in args.names:
            source = SOURCES[name]
            commit, files = list_files(source, args.revision, args.part)
            _show(source, commit, files, console)
            if args.dry_run:
                continue
            folder = args.to / source.folder
            sums = fetch(source, commit, files, folder)
            lines = "".join(f"{sums[f.name]}  {f.name}\n" for f in files)
            write_atomically(folder / "SHA256SUMS", f"# {source.repo} at {commit}\n{lines}")
            console.print(f"{folder}: {len(files)} files, all as the hub says", highlight=False, soft_wrap=True)
    except DownloadError as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{args.prog}: {args.to} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _show(source: Source, commit: str, files: list[RemoteFile], console: Console) -> None:
    """Print size and checksum of every file."""
    table = Table(title=f"{source.repo} at {commit}", title_justify="left", box=None)
    table.add_column("bytes", justify="right")
    table.add_column("file", overflow="fold")
    table.add_column("checksum on the hub", overflow="fold")
    for file in files:
        table.add_row(str(file.size), file.name, file.checksum)
    table.add_row(str(sum(file.size for file in files)), f"{len(files)} files", "")
    console.print(table)
