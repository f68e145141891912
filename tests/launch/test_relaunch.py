"""The shell around a run, with a command that ends as it is told."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def _run(tmp_path, codes, *, saves=(), script="launch/relaunch.sh", **environment):
    """Exit code and number of launches of a command that ends with `codes`, one after the other.

    Args:
        tmp_path: to work in.
        codes: the last one is repeated.
        saves: launches that leave a new checkpoint, from 1.
        script: under test.
        **environment: more variables.
    """
    tools = tmp_path / "bin"
    tools.mkdir()
    count, codes = tmp_path / "count", list(codes)
    body = f"""#!/usr/bin/env bash
n=$(( $(cat {count} 2>/dev/null || echo 0) + 1 )); echo $n > {count}
for s in {" ".join(map(str, saves))}; do
    [[ $s == $n ]] && mkdir -p {tmp_path}/run/checkpoints/$((100 * n))
done
codes=({" ".join(map(str, codes))})
exit ${{codes[$(( n <= {len(codes)} ? n - 1 : {len(codes) - 1} ))]}}
"""
    for name, text in (
        ("train", body),
        ("srun", body),
        ("sleep", "#!/bin/sh\n"),
        ("scontrol", f'#!/bin/sh\necho "$@" > {tmp_path}/scontrol\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    command = [] if script.endswith("sbatch") else ["train"]
    ended = subprocess.run(
        ["bash", script, *command, "--workdir", tmp_path / "run"],
        cwd=ROOT, env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    return ended.returncode, int(count.read_text())


@pytest.mark.parametrize("code", [0, 3, 4, 5, 6, 7])
def test_what_a_person_must_look_at_is_not_launched_again(tmp_path, code):
    assert _run(tmp_path, [code]) == (code, 1)


def test_preempted_broken_and_killed_runs_are_launched_again(tmp_path):
    assert _run(tmp_path, [42, 70, 134, 137, 143, 1, 0]) == (0, 7)


def test_launching_ends_after_ten_times_without_a_new_checkpoint(tmp_path):
    assert _run(tmp_path, [70], saves=[4]) == (70, 4 + 10)


def test_on_slurm_a_preempted_job_is_put_back_into_the_queue(tmp_path):
    script = "launch/slurm/train.sbatch"
    assert _run(tmp_path, [70, 42], script=script, SLURM_JOB_ID="77") == (42, 2)
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
