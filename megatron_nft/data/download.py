"""The published models and data sets on the Hugging Face hub: listed, downloaded, and checked file by file.

Only safetensors, parquet and text files are taken, never a pickle.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from megatron_nft.console import show_progress
from megatron_nft.files import sha256_of_file

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, ModelInfo

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
    """A repository on the hub, and the folder below the one of all downloads that it goes into."""

    repo: str
    kind: str  # model | dataset
    folder: str

    def patterns(self, part: str) -> tuple[str, ...]:
        """Return the patterns of the file names that are taken; `part` is `all` or `tokenizer`."""
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
        """What the hub gives as the file's checksum, with its kind."""
        return f"sha256 {self.sha256}" if self.sha256 else f"git {self.blob_id}"


class DownloadError(RuntimeError):
    """A download that failed. The message says what could not be had and what to do."""


def list_files(source: Source, revision: str | None, part: str) -> tuple[str, list[RemoteFile]]:
    """(commit, files that are taken). DownloadError when the hub cannot be asked or has nothing that we take."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        ask = HfApi().model_info if source.kind == "model" else HfApi().dataset_info
        info: ModelInfo | DatasetInfo = ask(source.repo, revision=revision, files_metadata=True)
    except (HfHubHTTPError, OSError) as e:
        raise DownloadError(f"{source.repo}: {_why(e)}") from None
    except Exception as e:  # httpx's errors have no common base with the hub's
        raise DownloadError(f"{source.repo}: the hub cannot be reached ({type(e).__name__}: {e})") from None
    siblings = info.siblings or []
    files = [
        RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id or "")
        for s in sorted(siblings, key=lambda s: s.rfilename)
        if any(fnmatch(PurePosixPath(s.rfilename).name, pattern) for pattern in source.patterns(part))
    ]
    weights = "*.safetensors" if source.kind == "model" else "*"
    if not files or (part == "all" and not any(fnmatch(f.name, weights) for f in files)):
        found = ", ".join(s.rfilename for s in siblings) or "nothing"
        raise DownloadError(f"{source.repo}: holds no {'safetensors' if source.kind == 'model' else 'data'}: {found}")
    return str(info.sha), files


def _why(error: Exception) -> str:
    """Say in one line what an error of the hub means."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "access has to be asked for on its page; then set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "not on the hub, or private: set HF_TOKEN"
    return f"{type(error).__name__}: {error}"


def fetch(source: Source, commit: str, files: list[RemoteFile], folder: Path) -> dict[str, str]:
    """Download and check every file; return their SHA-256 by name.

    A damaged file is fetched once more; DownloadError when it is still damaged, or the disk is too small.
    """
    missing = sum(f.size for f in files if not (folder / f.name).is_file())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DownloadError(f"{folder}: {_gigabytes(missing)} to download, but only {_gigabytes(free)} are free")
    _snapshot(source, commit, [f.name for f in files], folder)
    sums, damaged = check(files, folder)
    if damaged:
        _snapshot(source, commit, sorted(damaged), folder, force=True)
        again, damaged = check([f for f in files if f.name in damaged], folder)
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


def check(files: list[RemoteFile], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(SHA-256 of each file that has its size, what is wrong with each damaged one), by name."""
    sums: dict[str, str] = {}
    damaged: dict[str, str] = {}
    with show_progress("checking", sum(f.size for f in files), in_bytes=True) as progress:
        for file in files:
            path = folder / file.name
            size = path.stat().st_size if path.is_file() else 0
            if not path.is_file() or size != file.size:
                damaged[file.name] = f"{size} bytes, not {file.size}"
                continue
            sums[file.name] = sha256_of_file(path, partial(progress.advance, name=file.name))
            if not (sums[file.name] == file.sha256 if file.sha256 else _git_blob(path) == file.blob_id):
                damaged[file.name] = f"sha256 {sums[file.name]}, where the hub has {file.checksum}"
    return sums, damaged


def _git_blob(path: Path) -> str:
    """Git's checksum of a file; those outside large-file storage are small."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
