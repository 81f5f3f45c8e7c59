"""The command line.

    sparseramp search flows/specs/quickstart.toml prune.sparsity=0.7 run.dir=runs/seventy

A spec says what; the few options here say how it is shown. Nothing heavy is imported before the
spec is read. Exit codes: 0 done; 3 done, but cells of a study failed or are refused; 2 something
the user can put right (one line); 130 stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from infra import environment
from infra.errors import UserError, one_line

OVERRIDES = "section.key=value, say prune.sparsity=0.7 run.dir=runs/seventy"
OF_A_CHECKPOINT = "section.key=value, say data.report=other.txt"
SOME_UNFIT = 3  # 1 is what an uncaught error ends with


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes KEY=VALUE after an option such as --json for something unknown.
    if rest and not (hasattr(options, "overrides") and all("=" in r and r[0] != "-" for r in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    signal.signal(signal.SIGTERM, _stop)
    try:
        environment.prepare()
        environment.guard()
        code = options.command(options)
    except UserError as error:
        print(f"sparseramp: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        runs = options.name in ("search", "prune", "compare", "study", "recover")
        tunes = options.name == "recover"
        where = "from the last state that was saved" if tunes else "where it left off"
        promise = f"; the same command goes on {where}" if runs else ""
        print(f"sparseramp: stopped{promise}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # its reader has enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code or 0)


def _stop(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what runs is being cleaned up
    raise KeyboardInterrupt("SIGTERM")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparseramp",
        description="Find how sparse each layer of a network should be, and prove it.",
        epilog=f"Anything in a spec can be overridden: {OVERRIDES}",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function: Any, what: str, help: str, overrides: bool = True) -> Any:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command=function, name=name)
        if what:
            command.add_argument(what, metavar=what.upper())
        if overrides:
            example = OF_A_CHECKPOINT if what == "checkpoint" else OVERRIDES
            command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=example)
        command.add_argument("--json", action="store_true", help="output for programs")
        return command

    add("search", _search, "spec", "find the best beta, compare it with uniform, save and report")
    add("prune", _search, "spec", "prune at prune.beta, compare it with uniform, save and report")
    add(
        "compare",
        _compare,
        "spec",
        "search every cell of models x methods x allocations, and table",
    )
    add("study", _study, "spec", "run groups of cells on one cluster, fairly, within a budget")
    add("status", _status, "run", "say what is going on in a run, from its files", False)
    add(
        "stop",
        _stop_run,
        "run",
        "end the driver of a run in order, keeping what is finished",
        False,
    )
    add("check", _check, "spec", "resolve everything a spec names and say what would run where")
    add("evaluate", _evaluate, "checkpoint", "measure a saved checkpoint on its report split")
    recovers = "fine-tune a saved checkpoint, keeping every zero: 200 steps, or recovery.steps=N"
    add("recover", _recover, "checkpoint", recovers)
    add("speed", _speed, "checkpoint", "time a saved checkpoint on every engine that runs here")
    pack = add("pack", _pack, "checkpoint", "store a saved checkpoint without its zeros", False)
    pack.add_argument("--format", choices=["packed", "compressed-tensors"], default="packed")
    pack.add_argument("destination", nargs="?", metavar="DESTINATION", help="a new folder")
    add("report", _report, "run", "make the report of a run again from its files", False)
    board = add("dashboard", _dashboard, "run", "show a run in Optuna's dashboard", False)
    board.add_argument("--mlflow", action="store_true", help="in MLflow instead")
    board.add_argument("--port", type=int, default=0, help="of 127.0.0.1; else a free one")
    add("doctor", _doctor, "", "show versions, devices, memory and the cluster", False)
    return parser


def _search(options: argparse.Namespace) -> None:
    from infra.spec_files import load_spec

    suffix = "" if options.name == "search" else f"-{options.name}"  # each keeps its own run
    spec = load_spec(options.spec, options.overrides, run_suffix=suffix)
    if spec.compare.varies:
        lists = f"{options.name} ignores the lists of [compare]"
        print(f"sparseramp: {lists}: sparseramp compare {options.spec} runs them", file=sys.stderr)
    from flows import search

    run = search.prune if options.name == "prune" else search.search
    as_json = options.json or not sys.stdout.isatty()
    _show(run(spec, as_json=as_json), spec.run.dir, as_json)


def _compare(options: argparse.Namespace) -> None:
    from infra.spec_files import load_spec

    spec = load_spec(options.spec, options.overrides)
    from flows.compare import compare

    _show_comparison(compare(spec, as_json=options.json), spec.run.dir, options.json)


def _study(options: argparse.Namespace) -> int:
    from infra.study_files import load_study

    spec = load_study(options.spec, options.overrides)
    from flows.study import study

    as_json = options.json or not sys.stdout.isatty()
    board = study(spec, as_json=as_json)
    _show_leaderboard(board, spec.dir, as_json)
    from flows.leaderboard import unfit_cells

    unfit = unfit_cells(board)
    if unfit:
        states = ", ".join(
            f"{n} {state}" for state, n in Counter(r["state"] for r in unfit).items()
        )
        of = f"{len(unfit)} of {len(board['rows'])} cells have no result"
        print(f"sparseramp: {of} ({states}): {spec.dir}/leaderboard.html says why", file=sys.stderr)
    return SOME_UNFIT if unfit else 0


def _show_leaderboard(board: dict[str, Any], run: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"kind": "leaderboard", "run": run} | board))
        return
    from flows.leaderboard import print_leaderboard

    print_leaderboard(board, run)


def _status(options: argparse.Namespace) -> None:
    from flows.status import print_status, status

    found = status(Path(options.run))
    if options.json:
        print(json.dumps(found))
    else:
        print_status(found)


def _stop_run(options: argparse.Namespace) -> None:
    from flows.stop import stop

    kept = stop(Path(options.run))
    if options.json:
        print(json.dumps(kept))
    else:
        print(f"{kept['run']} has stopped; {kept['trials']} finished trials are kept")


def _report(options: argparse.Namespace) -> None:
    from flows.status import at_work, print_status, status

    if where := at_work(Path(options.run)):
        found = status(Path(options.run))
        if options.json:
            print(json.dumps(found))
            return
        print(f"{options.run} is at work, so no report is written now: what there is so far")
        print_status(found)
        if where.exists():
            print(f"report so far  {where}")
        return
    from flows.comparison import write_comparison
    from flows.report import write_report
    from infra.store import RunStore

    command = RunStore.read(options.run).command
    if command == "study":
        from flows.leaderboard import write_leaderboard

        _show_leaderboard(write_leaderboard(Path(options.run)), options.run, options.json)
        return
    if command == "recover":
        from flows.recovered import kept_recovery, print_recovery

        found = kept_recovery(Path(options.run))
        print(json.dumps(found)) if options.json else print_recovery(found)
        return
    if command == "compare":
        _show_comparison(write_comparison(Path(options.run)), options.run, options.json)
        return
    _show(write_report(Path(options.run)), options.run, options.json)


def _show(report: dict[str, Any], run: str, as_json: bool) -> None:
    if as_json:
        keys = ("metrics", "beta", "tilt", "sparsity", "bits")
        sides = {
            name: {key: report[name][key] for key in keys if key in report[name]}
            for name in ("dense", "uniform", "best")
            if report[name]
        }
        line = {"kind": "result", "run": run, **sides, "gain": report["gain"]}
        print(json.dumps(line | ({"recovery": told} if (told := report["recovery"]) else {})))
        return
    from flows.summary import print_summary

    print_summary(report, run)


def _show_comparison(comparison: dict[str, Any], run: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"kind": "comparison", "run": run, "rows": comparison["rows"]}))
        return
    from flows.comparison import print_comparison

    print_comparison(comparison, run)


def _check(options: argparse.Namespace) -> int:
    from infra.spec_files import is_study, load_spec

    if is_study(options.spec):
        from flows.check_study import check_study
        from infra.study_files import load_study

        found = check_study(load_study(options.spec, options.overrides), as_json=options.json)
        return SOME_UNFIT if found["refused"] else 0
    spec, pruned = (
        load_spec(options.spec, options.overrides, run_suffix=suffix) for suffix in ("", "-prune")
    )
    from flows.check import check

    check(spec, prune_dir=pruned.run.dir, as_json=options.json)
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    from flows.evaluate import evaluate

    evaluate(Path(options.checkpoint), options.overrides, as_json=options.json)


def _recover(options: argparse.Namespace) -> None:
    from flows.recover import recover

    recover(Path(options.checkpoint), options.overrides, as_json=options.json)


def _speed(options: argparse.Namespace) -> None:
    from flows.speed import speed

    speed(Path(options.checkpoint), options.overrides, as_json=options.json)


def _pack(options: argparse.Namespace) -> None:
    from flows.pack import pack_checkpoint

    destination = Path(options.destination) if options.destination else None
    format_ = options.format
    pack_checkpoint(Path(options.checkpoint), destination, format=format_, as_json=options.json)


def _dashboard(options: argparse.Namespace) -> None:
    from flows.dashboard import dashboard

    dashboard(Path(options.run), mlflow=options.mlflow, port=options.port, as_json=options.json)


def _doctor(options: argparse.Namespace) -> None:
    from flows.doctor import show

    show(as_json=options.json)


if __name__ == "__main__":
    main()
