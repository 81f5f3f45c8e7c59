"""Give every damaged or hostile input to the command line, from one warm process.

    python -m tests.faults.hostile [--step N] [WORDS OF A CASE]

Each must be refused on one line with exit code 2, within LONGEST_S, with no code of it executed and
nothing written outside the run directory. The last line is JSON: how many inputs and violations.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.faults.inputs import CANARY, CASES
from tests.faults.launcher import ROOT, fork, write_tiny_project
from tests.infra.packed_folders import write_packed

LONGEST_S = 5.0
SAMPLE = ROOT / "tests" / "data" / "run_version_1"


def main() -> int:
    """Run the cases whose name has the words, or every so many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    words = options.words
    import flows.evaluate
    import flows.search
    import flows.study
    import modalities.language  # noqa: F401
    import tasks.trial  # noqa: F401
    from tests.faults.processes import connect

    forked = partial(connect, method="fork")
    flows.search.connect = forked  # type: ignore[attr-defined, assignment]
    flows.study.study = partial(flows.study.study, connect=forked)  # type: ignore[arg-type, assignment]
    folder = Path(tempfile.mkdtemp(prefix="ramp-hostile-"))
    clean = folder / "clean"
    clean.mkdir()
    write_tiny_project(clean)
    if os.fork() == 0:  # torch starts threads when it packs
        write_packed(folder)
        os._exit(0)
    os.wait()
    shutil.move(folder / "packed", clean / "packed")
    shutil.copytree(SAMPLE, clean / "run")
    for path in [clean / "tiny.toml", *(clean / "run").rglob("*.*")]:
        if path.is_file():
            moved = path.read_text().replace("/home/user/tiny", str(folder / "sandbox"))
            path.write_text(moved.replace(str(clean), str(folder / "sandbox")))
    names = [name for name in CASES if all(word in name for word in words)][:: options.step]
    cases = {name: CASES[name] for name in names}
    wrong: dict[str, list[str]] = {}
    slowest = 0.0
    for name, case in cases.items():
        sandbox = folder / "sandbox"
        shutil.rmtree(sandbox, ignore_errors=True)
        shutil.copytree(clean, sandbox, symlinks=True)
        arguments = case(sandbox)
        before = _contents(sandbox)
        code, errors, seconds = _run(arguments, folder)
        slowest = max(slowest, seconds)
        found = []
        if code != 2:
            found.append(f"exit code {code}")
        if errors.count("\n") != 1 or not errors.startswith("sparseramp: "):
            found.append(f"not one line: {errors[-600:]!r}")
        elif not errors.rstrip("\n").isprintable():
            found.append(f"not printable: {errors[:300]!r}")
        elif len(errors) > 1000:
            found.append(f"a line of {len(errors)} characters")
        if seconds > LONGEST_S:
            found.append(f"{seconds:.1f} s")
        if (sandbox / CANARY).exists():
            found.append("executed")
        if changed := [
            path for path, data in _contents(sandbox).items() if before.get(path) != data
        ]:
            found.append(f"wrote {changed}")
        if found:
            wrong[name] = found
            print(f"{name}: {'; '.join(found)}", flush=True)
        elif words:
            print(f"{name}: {errors.strip()}")
    shutil.rmtree(folder)
    counts = {"inputs": len(cases), "violations": len(wrong), "slowest_s": round(slowest, 2)}
    print(json.dumps(counts))
    return 1 if wrong else 0


def _run(arguments: list[str], folder: Path) -> tuple[int, str, float]:
    """Exit code, errors and seconds of the processor, since the machine may be busy."""
    errors = folder / "errors.txt"

    def command() -> None:
        from flows import cli

        given = {"SPARSERAMP_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
        os.environ.update(given)
        cli.main(arguments)

    pid = fork(command, folder / "output.txt", errors)
    deadline = time.monotonic() + 60
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            seconds = used.ru_utime + used.ru_stime
            return os.waitstatus_to_exitcode(status), errors.read_text(), seconds
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _contents(sandbox: Path) -> dict[str, bytes]:
    """What is outside of the run directories."""
    return {
        str(path.relative_to(sandbox)): path.read_bytes()
        for path in sandbox.rglob("*")
        if path.is_file() and path.relative_to(sandbox).parts[0] not in ("run", "new")
    }


if __name__ == "__main__":
    sys.exit(main())
