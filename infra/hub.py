"""Repositories of the hub, in its own cache (HF_HOME): whole, or what they hold without weights.

    from_hub("org/model", None, None, "model", allow_pickle=False)   # a folder
    listing_of("org/model", "main", None, allow_pickle=False).names  # weights are not fetched

A listing is what a driver needs: the commit, the configuration and the names of all files. The
weights come where they are loaded.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from infra.errors import UserError, first_line

Kind = Literal["model", "tokenizer", "dataset"]

# Only what a spec names may be contacted; both are read when the hub's libraries are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

_TEXT = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "README.md", "LICENSE*"]
_PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npy", "*.npz"]
_TABLES = ["*.parquet", "*.jsonl", "*.json", "*.csv", "*.arrow", "*.txt", "*.raw"]
_TABLES += ["*.jsonl.gz", "*.json.gz", "*.csv.gz", "*.png", "*.jpg", "*.jpeg"]


@dataclass(frozen=True)
class Listing:
    """A model's small files, in `folder`, and the names of all that a worker would load, pickles
    included; of a path that is one file there are none."""

    commit: str
    folder: Path
    names: tuple[str, ...]


@functools.lru_cache(maxsize=64)  # so that one process sees one commit of a branch
def from_hub(
    repository: str, revision: str | None, path: str | None, kind: Kind, allow_pickle: bool
) -> Path:
    """The local file or folder; raises UserError where it is missing, unreachable or gated."""
    from huggingface_hub import snapshot_download

    repo_type = "dataset" if kind == "dataset" else "model"
    name = f"{repository}@{revision}" if revision else repository
    allow, ignore = _patterns(path, kind, allow_pickle)
    with _saying(repository, revision, repo_type):
        folder = Path(
            snapshot_download(
                repository,
                repo_type=repo_type,
                revision=revision,
                endpoint=os.environ.get("HF_ENDPOINT"),
                allow_patterns=allow,
                ignore_patterns=ignore,
            )
        )
    found = folder / (path or ".")
    if not found.exists() or (found.is_dir() and not any(p.is_file() for p in found.rglob("*"))):
        raise UserError(f"{name} holds no {path or 'file'} of a kind that may be loaded")
    return found


@functools.lru_cache(maxsize=64)
def listing_of(
    repository: str, revision: str | None, path: str | None, allow_pickle: bool
) -> Listing:
    """What a model holds, without its weights; raises UserError as `from_hub` does, and where the
    path is nothing that may be loaded."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT")
    inside = f"{path}/" if path else ""
    with _saying(repository, revision, "model"):
        small = snapshot_download(
            repository,
            revision=revision,
            endpoint=endpoint,
            allow_patterns=[inside + pattern for pattern in _TEXT],
            ignore_patterns=[f"{inside}*/*"],
        )
        folder = Path(small)
        try:
            told = get_cached_repo_tree(repository, revision=folder.name)
            names = [file.path for file in told]
        except CachedRepoTreeNotFoundError:  # offline, with what an older library has cached
            names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    allow, ignore = _patterns(path, "model", allow_pickle)
    if path and not any(_fits(name, allow) and not _fits(name, ignore) for name in names):
        raise UserError(f"{repository} holds no {path} of a kind that may be loaded")
    allow, ignore = _patterns(path, "model", allow_pickle=True)
    names = [name for name in names if _fits(name, allow) and not _fits(name, ignore)]
    beside = [name.removeprefix(inside) for name in names if name.startswith(inside)]
    top = tuple(name for name in beside if "/" not in name)
    return Listing(folder.name, folder / (path or "."), top)


def _patterns(path: str | None, kind: Kind, allow_pickle: bool) -> tuple[list[str], list[str]]:
    """Of the files that are fetched, and of those that are not."""
    pickles = [] if allow_pickle else _PICKLES
    if path:
        return [path, f"{path}/*"], pickles
    if kind == "dataset":
        return _TABLES, []
    weights = {"model": ["*.safetensors", *(_PICKLES[:4] if allow_pickle else [])]}
    # Subfolders and `consolidated` files repeat the weights in other formats.
    return _TEXT + weights.get(kind, []), ["*/*", "consolidated*", *pickles]


def _fits(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@contextmanager
def _saying(repository: str, revision: str | None, repo_type: str) -> Iterator[None]:
    """Raise as UserError what the hub, its cache or the way to it refuse."""
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{repository}@{revision}" if revision else repository
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: ask for access on its page, then log in (hf auth login)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name}: neither a file or folder here nor a {repo_type} on the hub (a private one "
            "needs hf auth login)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: neither a file or folder here nor complete in the hub's cache, and the hub "
            "cannot be reached"
        ) from error
    except (HfHubHTTPError, httpx2.HTTPError) as error:
        raise UserError(f"{name}: the hub failed: {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot write the hub's cache: {error.strerror}") from error
