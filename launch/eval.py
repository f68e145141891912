r"""Success rates of a policy in a simulator; killed at any moment, the same command goes on.

    python -m launch.eval --policy runs/x/policy --sim tabletop --tasks all --inits 0:100 \
        --workers 2 --out runs/eval/x --video failures
    python -m launch.eval compare runs/eval/x runs/eval/y  # paired by episode: McNemar's exact test
    python -m launch.eval page runs/eval/x                 # page.html, to look at
    python -m launch.eval audit --sim libero_plus_spatial  # which tasks have the files they need
    python -m launch.eval axes runs/eval/plus_spatial ...  # LIBERO-Plus by axis, several suites

--policy is the folder of a run, or a floor: hold, noise, replay:ROW:FOLDER:WORK, untrained:RUN.
Several hosts share --out and run the same command, found as in launch.train, or told apart by
--host 0 --hosts 8, --host 1 --hosts 8, ... The last line is one JSON object. Exit codes: 0 done;
4 something that cannot be used, or ledgers that cannot be compared; 70 a simulator or worker failed
for good.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import time
import traceback

from gear_jax.data.tfrecord import DataError
from gear_jax.evals import ledger, libero_plus_scores, policies, remote, runner, statistics
from gear_jax.evals.videos import WHICH, Keeper
from gear_jax.evals.worker import SIMULATORS

DONE, DATA, INTERNAL = 0, 4, 70


def main(argv=None):
    """Evaluate, or one of the other commands; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["compare"]:
            return _compare(argv[1:])
        for name, command in {"page": _page, "audit": _audit, "axes": _axes}.items():
            if argv[:1] == [name]:
                return command(argv[1:])
        return _evaluate(_arguments(argv))
    except (DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return DATA
    except remote.WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return INTERNAL
    except Exception as error:
        traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return INTERNAL


def _arguments(argv):
    parser = _parser("", __doc__)
    parser.add_argument("--policy", required=True, help="folder of a run, or a floor")
    parser.add_argument("--mask-guided", choices=("grabcut", "rectangle"),
                        help="mark the object in the first view, by this segmenter")  # fmt: skip
    parser.add_argument("--sim", required=True, choices=sorted(SIMULATORS))
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, for the simulator")
    parser.add_argument("--tasks", default="all", help="all, or names with commas between them")
    parser.add_argument("--inits", default="0:50", help="initial states, FIRST:END")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the ledger")
    parser.add_argument("--replan", type=int, default=10, help="rows of a chunk until the next")
    parser.add_argument("--seed", type=int, default=0, help="of the policy's noise")
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="factor of that noise, 0 .. 1; 1 as in training")  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="simulators at a time")
    parser.add_argument("--batch", type=int, help="queries of one call; half of the workers")
    parser.add_argument("--device-batch", type=int, default=8,
                        help="rows that a device sees at a time; it moves last bits")  # fmt: skip
    parser.add_argument("--worker-python", default=sys.executable, help="of the simulator's venv")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a worker may be silent")
    parser.add_argument("--restarts", type=int, default=3, help="of a worker within an episode")
    parser.add_argument("--video", choices=WHICH, default="none")
    parser.add_argument("--videos", type=int, default=20, help="at most, of each host")
    parser.add_argument("--host", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, inside the pod")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    args = parser.parse_args(argv)
    first, _, end = args.inits.partition(":")
    if not (first.isdecimal() and end.isdecimal()):
        raise ValueError(f"--inits {args.inits!r}: expected FIRST:END")
    args.inits = range(int(first), int(end))
    leasts = {"replan": 1, "workers": 1, "device_batch": 1, "restarts": 0, "videos": 0}
    for name, least in leasts.items():
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(args, name)}: expected at least {least}")
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch {args.batch}: expected at least 1")
    if not 0 <= args.host < args.hosts:
        raise ValueError(f"--host {args.host} of {args.hosts}: expected a host below --hosts")
    return args


def _evaluate(args):
    """Run this host's share; whoever ends last writes ledger.jsonl."""
    joined = _join(args)
    policy = policies.open_policy(
        args.policy, args.seed, args.mask_guided, replan=args.replan,
        temperature=args.temperature, device_batch=args.device_batch,
    )  # fmt: skip
    workers = remote.WorkerConfig(args.sim, args.options, args.worker_python, args.timeout)
    with contextlib.closing(remote.RemoteSimulator(workers)) as first:
        return _run(args, joined, policy, workers, first)


def _run(args, joined, policy, workers, first):
    try:
        hello = first.call("hello")
    except remote.WorkerGoneError as error:
        raise remote.WorkerError(str(error)) from error
    tasks = _chosen(remote.tasks_of(hello), args.tasks)
    episodes = runner.work_list(tasks, args.inits)
    steps = runner.steps_between(args.replan, policy.spec.rate_hz, hello["rate_hz"])
    protocol = runner.protocol_record(
        hello, workers, tasks, args.inits, replan=args.replan, steps_per_query=steps,
        seed=args.seed,
    )  # fmt: skip
    book = ledger.Ledger(args.out, protocol, dict(policy.identity()), host=args.host)
    config = runner.RunnerConfig(args.workers, args.batch, args.restarts)
    keeper = Keeper(args.out / "videos", args.video, args.videos)
    work = runner.Runner(
        policy, workers, tasks, hello["rate_hz"], steps, book, config, keeper, _say
    )
    begun, before = time.monotonic(), len(book.rows)
    try:
        work.run(runner.host_slice(episodes, args.host, args.hosts), first)
    finally:
        ran = len(book.rows) - before
        book.close()
    if joined:  # the coordinator lives in process 0: it may not leave before the others
        from gear_jax.train import hosts

        hosts.meet("evaluated")
    counts = {"mask_guided": policy.counts()} if args.mask_guided else {}
    return _report(args, episodes, ran, work.seconds, time.monotonic() - begun, counts)


def _report(args, episodes, ran, seconds, wall, counts):
    rows, _ = ledger.read(args.out)
    missing = sum(one not in rows for one in episodes)
    said = {"ok": True, "finished": not missing, "missing": missing}
    if not missing:
        said["ledger_sha256"] = ledger.finish(args.out)["ledger_sha256"]
    said |= statistics.count(row["success"] for row in rows.values())
    said |= counts | {
        "ran": ran,
        "episodes_per_hour": round(3600 * ran / wall) if ran else None,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "out": str(args.out),
    }
    if libero_plus_scores.of(rows):
        said["libero_plus"] = libero_plus_scores.by_axis(rows)["says"]
    print(json.dumps(said))
    return DONE


def _compare(argv):
    parser = _parser(" compare", "Two policies under one protocol, paired by episode.")
    parser.add_argument("first", type=pathlib.Path)
    parser.add_argument("second", type=pathlib.Path)
    args = parser.parse_args(argv)
    found = ledger.compare(args.first, args.second)
    for name in ("first", "second"):
        one = found[name]
        print(
            f"{getattr(args, name)}: {one['success']}/{one['episodes']} = "
            f"{100 * one['rate']:.1f} % ({100 * one['low']:.1f} .. {100 * one['high']:.1f})"
        )
    print(
        f"both {found['both']}, only the first {found['only_first']}, only the second "
        f"{found['only_second']}, neither {found['neither']}: p = {found['p']:.3g}"
    )
    if found["left_out"]:
        print(f"{found['left_out']} episodes that only one of them has are left out")
    print(json.dumps({"ok": True, **found}))
    return DONE


def _page(argv):
    parser = _parser(" page", "Write page.html into the folder of an evaluation.")
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args(argv)
    try:
        from gear_jax.report import eval_page
    except ImportError as error:
        raise DataError(f"pages need: pip install 'gear_jax[report]' ({error})") from error
    eval_page.write(args.folder, args.folder / "page.html")
    print(json.dumps({"ok": True, "page": str(args.folder / "page.html")}))
    return DONE


def _audit(argv):
    parser = _parser(" audit", "Which tasks have the files they need; nothing is run.")
    parser.add_argument("--sim", required=True, nargs="+", choices=sorted(SIMULATORS))
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, for the simulator")
    parser.add_argument("--worker-python", default=sys.executable, help="of the simulator's venv")
    args = parser.parse_args(argv)
    said = {"ok": True, "tasks": 0, "available": 0, "suites": []}
    for name in args.sim:
        worker = remote.WorkerConfig(name, args.options, args.worker_python)
        with contextlib.closing(remote.RemoteSimulator(worker)) as simulator:
            try:
                found = simulator.call("audit")
            except remote.WorkerGoneError as error:
                raise remote.WorkerError(str(error)) from error
        said["suites"].append(found)
        for axis, one in found["axes"].items():
            print(f"{found['suite']:20} {axis:12} {one['available']:5} of {one['tasks']:5} tasks")
            for key in one:
                said[key] += one[key]
        for folder, tasks in found["missing"].items():
            print(f"{found['suite']:20} {tasks} tasks lack files of {folder}")
    print(f"{said['available']} of {said['tasks']} tasks have what they need")
    print(json.dumps(said))
    return DONE


def _axes(argv):
    parser = _parser(" axes", "LIBERO-Plus by axis, from the folders of one policy.")
    parser.add_argument("folders", type=pathlib.Path, nargs="+")
    args = parser.parse_args(argv)
    rows = ledger.merge(args.folders, libero_plus_scores.MAY_DIFFER)
    found = libero_plus_scores.by_axis(rows)
    print(libero_plus_scores.table(found))
    print(json.dumps({"ok": True, **found}))
    return DONE


def _chosen(tasks, names):
    if names == "all":
        return tasks
    by_name = {task.name: task for task in tasks}
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in by_name]
    if unknown or len(set(wanted)) < len(wanted):
        more = f" and {len(by_name) - 20} more" if len(by_name) > 20 else ""
        raise ValueError(
            f"--tasks {names}: expected all, or some of {sorted(by_name)[:20]}{more}, once each"
        )
    return [task for task in tasks if task.name in wanted]


def _join(args):
    """Become one of several processes, where there are several and jax counts them."""
    run = args.policy.startswith("replay:") or pathlib.Path(args.policy).is_dir()
    if args.hosts > 1 or (not run and args.coordinator is None):  # a floor, or to be refused
        return False
    from gear_jax.train import hosts

    hosts.join(args.coordinator, args.num_processes, args.process_id)
    import jax

    args.host, args.hosts = jax.process_index(), jax.process_count()
    return args.hosts > 1


def _say(line):
    print(line, file=sys.stderr, flush=True)


def _parser(command, text):
    return argparse.ArgumentParser(
        prog=f"python -m launch.eval{command}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _end(code):
    sys.stdout.flush()
    sys.stderr.flush()
    joined = sys.modules.get("gear_jax.train.hosts")
    if joined is not None:
        joined.end(code, together=code == DONE)
    sys.exit(code)


if __name__ == "__main__":
    _end(main())
