import json
import re

import pytest

from configs.quickstart import STAGES
from gear_jax.report import eval_page, quickstart_page

WORDS = {"title": "A toy", "note": "of boxes & belongs in no table"}
COUNT = {"success": 8, "episodes": 10, "rate": 0.8, "low": 0.49, "high": 0.94}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished quickstart as its report finds it; the evaluations' own pages are tested apart."""
    written = []
    monkeypatch.setattr(eval_page, "write", lambda folder, target: written.append(target.parent))
    for stage, key in (("latents", "reconstruction"), ("pretrain", "latent"), ("policy", "flow")):
        (tmp_path / stage).mkdir()
        rows = [{"step": step, key: 1 / step, f"held_out/{key}": None} for step in (1, 2, 3)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / stage / "metrics.jsonl").write_text(text)
    films = tmp_path / "eval/named/videos/tabletop"
    films.mkdir(parents=True)
    (films / "pick_red-0003-failure.mp4").write_bytes(b"film")
    return tmp_path, written


def test_the_report_shows_success_beside_its_floors_films_curves_and_costs(run):
    folder, written = run
    found = dict.fromkeys(("named", "other", "untrained", "replay"), COUNT)
    seconds = {"latents": 61.0, "pretrain": 170.0, "policy": 300.5}
    quickstart_page.write(folder, found, seconds, **WORDS)
    page = (folder / "report.html").read_text()
    assert page.count("8 of 10 = 80 % (95 %: 49 .. 94)") == 4
    assert '<figcaption class="bad">pick_red-0003-failure' in page
    assert "told of another block</th>" in page
    assert page.count("the trained policy should fail") == 1
    assert "data:video/mp4;base64,ZmlsbQ==" in page
    assert page.count("data:image/png;base64,") == 5  # success, three curves, costs
    assert "of boxes &amp; belongs in no table" in page
    assert "<title>A toy</title>" in page
    assert [path.name for path in written] == list(found)


def test_every_stage_that_ran_has_its_curve_and_no_other(run):
    folder, _ = run
    for stage in STAGES:
        (folder / stage).mkdir(exist_ok=True)
        rows = '{"step": 1, "text": 2, "reconstruction": 2, "flow": 2}\n'
        (folder / stage / "metrics.jsonl").write_text(rows)
    for ran in (STAGES, STAGES[-2:]):
        quickstart_page.write(folder, {"named": COUNT}, dict.fromkeys(ran, 1.0), **WORDS)
        drawn = re.findall('alt="losses of ([a-z_]+)"', (folder / "report.html").read_text())
        assert drawn == list(ran)


def test_a_run_without_films_says_so(run):
    folder, _ = run
    for path in (folder / "eval/named/videos").rglob("*.mp4"):
        path.unlink()
    quickstart_page.write(folder, {"named": COUNT}, {"policy": 1.0}, **WORDS)
    assert "should fail" not in (folder / "report.html").read_text()
    assert "No films were kept." in (folder / "report.html").read_text()


def test_films_are_of_every_task_and_not_of_the_quickest_alone(run):
    folder, _ = run
    films = folder / "eval/named/videos/tabletop"
    for task in ("pick_red", "pick_blue"):
        for init in range(20):
            (films / f"{task}-{init:04d}-{('success', 'failure')[init % 2]}.mp4").write_bytes(b"f")
    quickstart_page.write(folder, {"named": COUNT}, {"policy": 1.0}, **WORDS)
    page = (folder / "report.html").read_text()
    assert page.count("data:video/mp4") == 12
    assert page.count("pick_blue-") == page.count("pick_red-") == 6
    assert "pick_blue-0005-failure" in page
    assert '<figcaption class="note">pick_blue-0000-success' in page
