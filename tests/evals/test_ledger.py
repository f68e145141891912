import contextlib
import json
import re

import pytest

from gear_jax.evals.episodes import Episode
from gear_jax.evals.ledger import Ledger, compare, finish, read

PROTOCOL = {"replan": 10, "sim": {"name": "point", "size": 32}}
POLICY = {"checkpoint": "abc"}


def fill(folder, outcomes, *, host=0, protocol=PROTOCOL, policy=POLICY):
    with contextlib.closing(Ledger(folder, protocol, policy, host=host)) as book:
        for init, success in outcomes.items():
            book.add(Episode("s", "t", init), success=success, steps=7, queries=2)
            book.add_timing(Episode("s", "t", init), {"wall": 0.123456})


def test_rows_come_back_with_the_digests_and_without_timings(tmp_path):
    fill(tmp_path, {1: True, 0: False})
    rows, torn = read(tmp_path)
    assert list(rows) == [("s", "t", 0), ("s", "t", 1)]
    assert torn == 0
    digests = json.loads((tmp_path / "protocol.json").read_text())["digests"]
    assert rows["s", "t", 1] == {
        "suite": "s", "task": "t", "init": 1, "success": True, "steps": 7, "queries": 2, **digests,
    }  # fmt: skip
    timing = (tmp_path / "timings-0.jsonl").read_text().splitlines()[0]
    assert timing == '{"init":1,"suite":"s","task":"t","wall":0.1235}'


def test_the_merged_ledger_has_the_same_bytes_however_it_came_about(tmp_path):
    fill(tmp_path / "a", {0: True, 1: False, 2: True})
    fill(tmp_path / "b", {2: True}, host=1)
    fill(tmp_path / "b", {1: False})
    fill(tmp_path / "b", {0: True}, host=3)
    fill(tmp_path / "b", {2: True}, host=2)  # twice, and equal
    first, second = finish(tmp_path / "a"), finish(tmp_path / "b")
    assert first == second
    for name in ("ledger.jsonl", "summary.json", "protocol.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert first["total"]["success"] == 2
    assert not list(tmp_path.glob("*/.*"))


def test_a_torn_last_line_is_dropped_counted_and_cut_off_by_the_next_writer(tmp_path):
    fill(tmp_path, {0: True, 1: False})
    path = tmp_path / "episodes-0.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        rows, torn = read(tmp_path)
        assert (len(rows), torn) == (1, 1)
    fill(tmp_path, {1: False})
    assert path.read_bytes() == whole


def test_a_line_that_is_no_row_is_named(tmp_path):
    fill(tmp_path, {0: True, 1: False})
    path = tmp_path / "episodes-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0][:20] + b"\n" + lines[1])
    with pytest.raises(ValueError, match="episodes-0.jsonl line 1 is not JSON"):
        read(tmp_path)
    for before, after in ((b'"steps":7', b'"steps":true'), (b'"steps"', b'"stops"')):
        path.write_bytes(lines[0] + lines[1].replace(before, after))
        with pytest.raises(ValueError, match="line 2 is .*expected the fields"):
            read(tmp_path)
    path.write_bytes(lines[0] + re.sub(rb'"policy":"..', b'"policy":"zz', lines[1]))
    with pytest.raises(ValueError, match="line 2 belongs to another protocol or policy"):
        read(tmp_path)


def test_an_episode_that_ended_in_two_ways_is_an_error(tmp_path):
    fill(tmp_path, {0: True})
    with pytest.raises(ValueError, match="s 't' 0 ended in two ways"):
        fill(tmp_path, {0: False}, host=1)
    row = (tmp_path / "episodes-0.jsonl").read_text().replace("true", "false")
    (tmp_path / "episodes-1.jsonl").write_text(row)
    with pytest.raises(ValueError, match="s 't' 0 ended in two ways"):
        read(tmp_path)


def test_another_protocol_or_policy_is_refused_by_what_differs(tmp_path):
    fill(tmp_path, {0: True})
    other = {"replan": 5, "sim": {"name": "point", "size": 32, "shadows": True}}
    with pytest.raises(ValueError, match="begun with another protocol: replan is 10 there and 5 "
                       "now; sim.shadows is absent there and true now"):  # fmt: skip
        fill(tmp_path, {}, protocol=other)
    with pytest.raises(ValueError, match='another policy: checkpoint is "abc" there and "x" now'):
        fill(tmp_path, {}, policy={"checkpoint": "x"})
    long = [{"tasks": [*range(100), end]} for end in (1, 2)]
    fill(tmp_path / "long", {}, protocol=long[0])
    with pytest.raises(ValueError, match=r"tasks is \[0,1,.*\.\.\. there"):
        fill(tmp_path / "long", {}, protocol=long[1])


def test_a_record_that_was_changed_by_hand_is_refused(tmp_path):
    fill(tmp_path, {0: True})
    path = tmp_path / "protocol.json"
    path.write_text(path.read_text().replace('"replan": 10', '"replan": 5'))
    with pytest.raises(ValueError, match="digests are not those of its contents"):
        read(tmp_path)
    with pytest.raises(ValueError, match="nothing/protocol.json is no record"):
        read(tmp_path / "nothing")


def test_one_file_has_one_writer(tmp_path):
    book = Ledger(tmp_path, PROTOCOL, POLICY)
    with pytest.raises(ValueError, match="episodes-0.jsonl is being written by another process"):
        Ledger(tmp_path, PROTOCOL, POLICY)
    Ledger(tmp_path, PROTOCOL, POLICY, host=1).close()
    book.close()
    Ledger(tmp_path, PROTOCOL, POLICY).close()


def test_policies_are_compared_under_one_protocol_only(tmp_path):
    fill(tmp_path / "a", dict.fromkeys(range(6), True))
    fill(tmp_path / "b", dict.fromkeys(range(6), False), policy={"checkpoint": "def"})
    assert compare(tmp_path / "a", tmp_path / "b")["p"] == 2 / 64
    fill(tmp_path / "c", {0: True}, protocol={"replan": 5})
    with pytest.raises(ValueError, match="different protocols: replan is 10 in the first and 5 in"):
        compare(tmp_path / "a", tmp_path / "c")
