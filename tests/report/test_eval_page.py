"""The page says what the ledger says. What it looks like is for eyes."""

import base64
import contextlib
import html
import re

import numpy as np
import pytest

from gear_jax.data.windows import empty_state
from gear_jax.evals.episodes import Answer, Episode, Query
from gear_jax.evals.ledger import Ledger
from gear_jax.evals.policies import HoldPolicy
from gear_jax.evals.videos import Keeper
from gear_jax.report import eval_page
from gear_jax.types import Observation


def evaluation(folder, outcomes, *, videos=0, suite="s"):
    """A ledger of {task: string of 0 and 1}, and videos of the first failures."""
    protocol = {
        "simulator": {"name": "toy <b>"}, "rate_hz": 20.0, "steps_per_query": 7, "inits": [0, 4],
        "tasks": {suite: {task: {"max_steps": 30} for task in outcomes}},
    }  # fmt: skip
    keeper, policy = Keeper(folder / "videos", "failures", videos), HoldPolicy()
    with contextlib.closing(Ledger(folder, protocol, {"name": "x & y"})) as book:
        for task, flags in outcomes.items():
            for init, flag in enumerate(flags):
                one = Episode(suite, task, init)
                book.add(one, success=flag == "1", steps=9, queries=2)
                book.add_timing(one, {"physics": 1.0, "render": 0.5, "policy": 0.25, "wall": 2.0})
                keeper.keep(one, flag == "1", [seen(keeper, policy, one, n) for n in (0, 1)])
    return folder


def seen(keeper, policy, episode, number):
    state = empty_state()
    state["arm_mask"][1] = True
    picture = np.full((24, 24, 3), 40, np.uint8)
    query = Query(Observation({"head": picture}, "", "franka", state), *episode, number)
    (answer,) = policy([query])
    return keeper.shrink(query, Answer(answer.action, np.array([3, 3, 5, 5], np.int32)))


def page(folder):
    eval_page.write(folder, folder / "page.html")
    return (folder / "page.html").read_text()


def test_counts_intervals_videos_codes_and_protocol_are_on_the_page(tmp_path):
    text = page(evaluation(tmp_path, {"lift": "1110", "push <i>": "00"}, videos=2))
    plain = html.unescape(re.sub(r"<[^>]+>", " ", text))
    for words in (
        "3/6 = 50.0 % (95 %: 18.8 .. 81.2)",
        "3/4 = 75.0 % (95 %: 30.1 .. 95.4)",
        "0/2 = 0.0 % (95 %: 0.0 .. 65.8)",
        "6 of 8",
        "3 successes; median 9 steps",
        "2 different ids, perplexity 2.0",
        "x & y",
        "tasks.s.lift.max_steps",
        "s: lift-0003-failure",
    ):
        assert words in plain, words
    videos = re.findall(r"data:video/mp4;base64,([^\"]+)", text)
    kept = [path.read_bytes() for path in sorted(tmp_path.glob("videos/s/*.mp4"))]
    assert [base64.b64decode(one) for one in videos] == kept
    assert len(kept) == 2
    assert len(re.findall("data:image/png", text)) == 4
    assert "<b>" not in text
    assert "<i>" not in text


def test_failures_come_first_among_the_videos(tmp_path):
    folder = evaluation(tmp_path, {"a": "1", "b": "0"}, videos=1)
    (folder / "videos/s/a-0000-success.mp4").write_bytes(b"film")
    text = page(folder)
    assert text.index("s: b-0000-failure") < text.index("s: a-0000-success")
    assert '<figcaption class="bad">s: b-0000-failure' in text


def test_a_page_can_be_made_before_anything_succeeded_and_of_many_tasks(tmp_path):
    text = page(evaluation(tmp_path, {f"task {number}": "0" for number in range(61)}))
    assert "No episode succeeded." in text
    assert "No videos were kept" in text
    assert text.count("0/61 = 0.0 %") == 3  # in total and, since tasks are many, by suite
    assert "0/1 = " not in text


def test_a_part_of_libero_plus_stands_there_by_axis_and_without_a_score(tmp_path):
    outcomes = {"go_light_1": "1", "go_light_2": "0", "go_table_1": "1"}
    text = page(evaluation(tmp_path, outcomes, suite="libero_plus_goal"))
    plain = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))
    assert "axis light 1/2, of 1142 tasks" in plain
    assert "axis camera 0/0, of 1599 tasks" in plain
    assert "2 successes in 3 of 10030 tasks, incomplete: camera" in plain
    assert "average" not in plain


def test_a_folder_without_episodes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no episode yet"):
        page(evaluation(tmp_path, {}))
