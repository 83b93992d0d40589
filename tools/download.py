"""Downloads the published models and data sets, each file checked against the hub's own size and checksum.

    python tools/download.py qwen2.5-math-7b dapo-math-17k validation --to data
    python tools/download.py qwen2.5-math-7b --part tokenizer --to data
    python tools/download.py nft-7b --to data --dry-run

Only safetensors, parquet and text files are taken, never a pickle. An interrupted download goes on with the files that
are not complete; those that are there are checked again. Every folder gets a SHA256SUMS file for `sha256sum -c`.
HF_TOKEN, HF_ENDPOINT and the other variables of huggingface_hub are honoured.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
)
MODEL = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER)
DATASET = ("*.parquet", "*.jsonl")
TEXT = ("README.md", "LICENSE*")


@dataclass(frozen=True)
class Source:
    """A repository on the hub and the folder below --to that it goes into."""

    repo: str
    kind: str  # model | dataset
    folder: str

    def patterns(self, part: str) -> tuple[str, ...]:
        """File names that are taken."""
        if part == "tokenizer":
            return ("config.json", *TOKENIZER)
        return (*(MODEL if self.kind == "model" else DATASET), *TEXT)


SOURCES = {
    "qwen2.5-math-7b": Source("Qwen/Qwen2.5-Math-7B", "model", "models/Qwen2.5-Math-7B"),
    "qwen2.5-32b": Source("Qwen/Qwen2.5-32B", "model", "models/Qwen2.5-32B"),
    "nft-7b": Source("nvidia/NFT-7B", "model", "models/NFT-7B"),
    "nft-32b": Source("nvidia/NFT-32B", "model", "models/NFT-32B"),
    "dapo-math-17k": Source("BytedTsinghua-SIA/DAPO-Math-17k", "dataset", "datasets/DAPO-Math-17k"),
    "validation": Source("ChenDRAG/VeRL_math_validation", "dataset", "datasets/VeRL_math_validation"),
}


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it."""

    name: str
    size: int  # bytes
    sha256: str | None  # of files in large-file storage
    blob_id: str  # git's SHA-1 of the others

    @property
    def checksum(self) -> str:
        return f"sha256 {self.sha256}" if self.sha256 else f"git {self.blob_id}"


class DownloadError(RuntimeError):
    """What could not be had, and what to do."""


def list_files(source: Source, revision: str | None, part: str) -> tuple[str, list[RemoteFile]]:
    """(commit, files that are taken). DownloadError when the hub cannot be asked or has nothing that we take."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().repo_info(source.repo, repo_type=source.kind, revision=revision, files_metadata=True)
    except (HfHubHTTPError, OSError) as e:
        raise DownloadError(f"{source.repo}: {_why(e)}") from None
    except Exception as e:  # httpx's errors have no common base with the hub's
        raise DownloadError(f"{source.repo}: the hub cannot be reached ({type(e).__name__}: {e})") from None
    files = [
        RemoteFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in sorted(info.siblings, key=lambda s: s.rfilename)
        if any(fnmatch(PurePosixPath(s.rfilename).name, pattern) for pattern in source.patterns(part))
    ]
    weights = "*.safetensors" if source.kind == "model" else "*"
    if not files or (part == "all" and not any(fnmatch(f.name, weights) for f in files)):
        found = ", ".join(s.rfilename for s in info.siblings) or "nothing"
        raise DownloadError(f"{source.repo}: holds no {'safetensors' if source.kind == 'model' else 'data'}: {found}")
    return info.sha, files


def _why(error: Exception) -> str:
    """The hub's errors in our words."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "access has to be asked for on its page; then set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "not on the hub, or private: set HF_TOKEN"
    return f"{type(error).__name__}: {error}"


def fetch(source: Source, commit: str, files: list[RemoteFile], folder: Path, console: Console) -> dict[str, str]:
    """Download and check every file; returns their SHA-256.

    A damaged file is fetched once more; DownloadError when it is still damaged, or the disk is too small.
    """
    missing = sum(f.size for f in files if not (folder / f.name).is_file())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DownloadError(f"{folder}: {_bytes(missing)} to download, but only {_bytes(free)} are free")
    _snapshot(source, commit, [f.name for f in files], folder)
    sums, damaged = check(files, folder, console)
    if damaged:
        _snapshot(source, commit, sorted(damaged), folder, force=True)
        again, damaged = check([f for f in files if f.name in damaged], folder, console)
        sums |= again
    if damaged:
        lines = "".join(f"\n  {name}: {what}" for name, what in damaged.items())
        raise DownloadError(f"{folder}: files that are not what the hub says they are, after a second download:{lines}")
    return sums


def _snapshot(source: Source, commit: str, names: list[str], folder: Path, force: bool = False) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            source.repo,
            repo_type=source.kind,
            revision=commit,
            local_dir=folder,
            allow_patterns=names,
            force_download=force,
        )
    except Exception as e:  # requests, httpx, xet and the hub each have their own
        raise DownloadError(
            f"{source.repo}: the download broke off ({type(e).__name__}: {e}); run it again to go on"
        ) from None


def check(files: list[RemoteFile], folder: Path, console: Console) -> tuple[dict[str, str], dict[str, str]]:
    """(SHA-256 of each file, what is wrong with each damaged one)."""
    sums, damaged = {}, {}
    columns = (TextColumn("checking {task.fields[name]}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=sum(f.size for f in files), name="")
        for file in files:
            progress.update(bar, name=file.name)
            path = folder / file.name
            if not path.is_file() or path.stat().st_size != file.size:
                damaged[file.name] = f"{path.stat().st_size if path.is_file() else 0} bytes, not {file.size}"
                continue
            sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
            with path.open("rb") as f:
                while block := f.read(1 << 22):
                    sha256.update(block)
                    if not file.sha256:
                        git.update(block)
                    progress.advance(bar, len(block))
            got = sha256.hexdigest()
            if got != file.sha256 if file.sha256 else git.hexdigest() != file.blob_id:
                damaged[file.name] = f"sha256 {got}, where the hub has {file.checksum}"
            sums[file.name] = got
    return sums, damaged


def show(source: Source, commit: str, files: list[RemoteFile], console: Console) -> None:
    table = Table(title=f"{source.repo} at {commit}", title_justify="left", box=None)
    table.add_column("bytes", justify="right")
    table.add_column("file", overflow="fold")
    table.add_column("checksum on the hub", overflow="fold")
    for f in files:
        table.add_row(str(f.size), f.name, f.checksum)
    table.add_row(str(sum(f.size for f in files)), f"{len(files)} files", "")
    console.print(table)


def _bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="names:\n" + "\n".join(f"  {n:16} {s.kind} {s.repo} -> {s.folder}" for n, s in SOURCES.items()),
    )
    parser.add_argument("names", nargs="+", choices=SOURCES, metavar="NAME", help="what to download (see below)")
    parser.add_argument("--to", type=Path, default=Path("data"), help="folder to download into (default: data)")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--part", choices=("all", "tokenizer"), default="all", help="all, or just tokenizer and config")
    parser.add_argument("--dry-run", action="store_true", help="show files, sizes and checksums; download nothing")
    args = parser.parse_args(argv)
    console = Console()
    try:
        for name in args.names:
            source = SOURCES[name]
            commit, files = list_files(source, args.revision, args.part)
            show(source, commit, files, console)
            if args.dry_run:
                continue
            folder = args.to / source.folder
            sums = fetch(source, commit, files, folder, console)
            lines = "".join(f"{sums[f.name]}  {f.name}\n" for f in files)
            (folder / "SHA256SUMS").write_text(f"# {source.repo} at {commit}\n{lines}", encoding="utf-8")
            console.print(f"{folder}: {len(files)} files, all as the hub says", highlight=False, soft_wrap=True)
    except DownloadError as e:
        print(f"download: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"download: {args.to} cannot be written: {e.strerror or e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
