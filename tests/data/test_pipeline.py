import itertools
import json

import numpy as np
import pytest
import simplejpeg

from gear_jax.data.catalog import DatasetConfig, detect_format, open_prepared, open_source
from gear_jax.data.embodiments import embodiment_id
from gear_jax.data.images import Fit, decode, fit_into
from gear_jax.data.measure import Measured, measure
from gear_jax.data.mixtures import Phase
from gear_jax.data.normalizer import Normalizer
from gear_jax.data.pipeline import Stream, StreamConfig
from gear_jax.data.record_packs import Packed, Room
from gear_jax.data.record_pool import Pool
from gear_jax.data.record_state import write_state
from gear_jax.data.rlds_writer import Column, RldsWriter
from gear_jax.data.sequences import Question
from gear_jax.data.statistics import denormalize_action, normalize_state
from gear_jax.data.tfrecord import DataError
from gear_jax.data.windows import make_window, mirror_single_arm
from gear_jax.types import ActionSpec
from tests.data.sources.test_video import write_video

SPEC = ActionSpec()
COLUMNS = {
    "steps/observation/eef_pos": Column("tensor", (3,)),
    "steps/observation/eef_quat_wxyz": Column("tensor", (4,)),
    "steps/observation/joint_pos": Column("tensor", (7,)),
    "steps/observation/gripper_width": Column("tensor", ()),
    "steps/observation/image_base_2": Column("image", (32, 48, 3)),
    "steps/observation/image_ego": Column("image", (32, 32, 3)),
    "steps/action": Column("tensor", (8,)),
    "steps/language_instruction": Column("text"),
    "episode_metadata/has_image_base_2": Column("tensor", (), "bool"),
    "episode_metadata/has_image_ego": Column("tensor", (), "bool"),
}


def _jpeg(rng, height, width):
    colour = rng.integers(0, 256, 3)
    image = np.full((height, width, 3), colour, np.uint8)
    return simplejpeg.encode_jpeg(image, 95)


def write_robot(folder, *, lengths=(5, 9, 12), bad_images=(), has_head=True):
    rng = np.random.default_rng(0)
    with RldsWriter(folder, "robot", COLUMNS) as writer:
        for steps in lengths:
            quat = np.tile([1.0, 0, 0, 0], (steps, 1)) + 0.1 * rng.standard_normal((steps, 4))
            images = {
                "steps/observation/image_base_2": [_jpeg(rng, 32, 48) for _ in range(steps)],
                "steps/observation/image_ego": [_jpeg(rng, 32, 32) for _ in range(steps)],
            }
            for step in bad_images:
                images["steps/observation/image_ego"][step] = b"\xff\xd8 no picture"
            action = np.zeros((steps, 8))
            action[:, 7] = np.where(np.arange(steps) % 4 < 2, -1.0, 1.0)
            writer.add(
                {
                    "steps/observation/eef_pos": np.cumsum(
                        0.01 * rng.standard_normal((steps, 3)), axis=0
                    ),
                    "steps/observation/eef_quat_wxyz": quat
                    / np.linalg.norm(quat, axis=1, keepdims=True),
                    "steps/observation/joint_pos": rng.standard_normal((steps, 7)),
                    "steps/observation/gripper_width": 0.7 * rng.random(steps),
                    "steps/action": action,
                    "steps/language_instruction": [f"pick {steps}"] * steps,
                    "episode_metadata/has_image_base_2": has_head,
                    "episode_metadata/has_image_ego": True,
                    **images,
                }
            )
    return folder / "robot" / "1.0.0"


def write_pool(folder):
    rng = np.random.default_rng(1)
    lines = []
    for n in range(7):
        (folder / f"{n}.jpg").write_bytes(_jpeg(rng, 40, 60))
        lines.append(
            {"id": f"v{n}", "type": "object_point", "images": [f"{n}.jpg"], "label": "mug",
             "points": [[n, 5]]}
        )  # fmt: skip
    (folder / "pool.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Pool(folder / "pool.jsonl")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for name, frames in (("a", 20), ("b", 9)):
        write_video(folder / "video" / f"{name}.mp4", [9 * i for i in range(frames)], fps=5)
    (folder / "vl").mkdir()
    robot = DatasetConfig(str(write_robot(folder)), "franka_sim_pick", str(folder / "w1"))
    video = DatasetConfig(str(folder / "video"), "video", str(folder / "w2"), format="video")
    return {
        "robot": open_prepared(robot),
        "video": open_prepared(video),
        "points": write_pool(folder / "vl"),
    }


@pytest.fixture(scope="module")
def normalizer(sets):
    measured = measure(sets["robot"], SPEC)
    statistics = measured.statistics("franka")
    return Normalizer(statistics, {"franka": statistics}, SPEC)


PHASES = [
    Phase(0.0, {"robot": 0.5, "video": 0.2, "points": 0.3}),
    Phase(0.5, {"robot": 0.8, "video": 0.1, "points": 0.1}),
]
CONFIG = StreamConfig(batch_size=8, num_samples=2 * 4096, image_size=56)


def _same(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            _same(value, two[key])
        elif isinstance(value, list):
            assert value == two[key], key
        else:
            np.testing.assert_array_equal(value, two[key], err_msg=key)


def _joined(parts):
    """Batches of several hosts as one."""
    first = parts[0]

    def join(key, value):
        parted = [part[key] for part in parts]
        if isinstance(value, dict):
            return _joined(parted)
        if isinstance(value, list):
            return list(itertools.chain(*parted))
        return np.concatenate(parted)

    return {key: join(key, value) for key, value in first.items()}


def _take(sets, count, config=CONFIG, **options):
    stream = Stream(sets, PHASES, config, **options)
    batches = [next(stream) for _ in range(count)]
    batches = [_joined([batch]) for batch in batches]  # copies: workers use their memory again
    state = json.loads(json.dumps(stream.state()))
    stream.close()
    return batches, state


@pytest.fixture(scope="module")
def straight(sets, normalizer):
    return _take(sets, 6, normalizer=normalizer)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_stream_is_the_same_for_any_number_of_workers(sets, normalizer, straight, num_workers):
    batches, state = _take(sets, 6, normalizer=normalizer, num_workers=num_workers)
    for one, two in zip(straight[0], batches, strict=True):
        _same(one, two)
    assert state == straight[1]


def test_the_stream_is_the_same_for_one_host_and_for_two(sets, normalizer, straight):
    hosts = [_take(sets, 6, normalizer=normalizer, host=h, num_hosts=2) for h in range(2)]
    for step in range(6):
        _same(straight[0][step], _joined([hosts[0][0][step], hosts[1][0][step]]))
    assert hosts[0][1] == hosts[1][1] == straight[1]


@pytest.mark.parametrize("done", range(6))
def test_the_stream_goes_on_at_any_step(sets, normalizer, straight, done):
    state = straight[1] | {"samples": 8 * done}
    batches, _ = _take(sets, 6 - done, normalizer=normalizer, state=state)
    for one, two in zip(straight[0][done:], batches, strict=True):
        _same(one, two)


def test_a_resumed_stream_with_workers_two_hosts_and_another_batch_size(sets, normalizer, straight):
    config = StreamConfig(batch_size=16, num_samples=2 * 4096, image_size=56)
    state = straight[1] | {"samples": 16}
    batches, _ = _take(sets, 2, config, normalizer=normalizer, state=state, num_workers=2)
    _same(batches[0], _joined(straight[0][2:4]))
    _same(batches[1], _joined(straight[0][4:6]))


def test_across_the_phases_of_a_curriculum(sets):
    at = {"samples": 4096 - 8}
    state = Stream(sets, PHASES, CONFIG).state() | at
    batches, _ = _take(sets, 30, state=state)
    robots = np.concatenate([batch["source"] for batch in batches]) == 0
    assert abs(robots[8:].mean() - 0.8) < 0.05


def test_another_stream_is_refused_in_one_sentence_that_says_what_changed(
    sets, normalizer, tmp_path
):
    state = Stream(sets, PHASES, CONFIG, normalizer).state()
    other = DatasetConfig(str(write_robot(tmp_path, lengths=(5, 9))), "franka_sim_pick",
                          str(tmp_path / "w"))  # fmt: skip
    longer = StreamConfig(batch_size=8, num_samples=2 * 4096, image_size=56, seed=7)
    fewer = {name: sets[name] for name in ("robot", "video")}
    cases = [
        (sets | {"robot": open_prepared(other)}, PHASES, CONFIG, "data set 'robot'"),
        (fewer, [Phase(0.0, {"robot": 0.5, "video": 0.5})], CONFIG, "list of data sets, weights"),
        (sets, PHASES[:1], CONFIG, "changed weights"),
        (sets, PHASES, longer, "changed seed"),
    ]
    for these, phases, config, what in cases:
        with pytest.raises(DataError, match=f"at sample 0 is of another stream: .*{what}"):
            Stream(these, phases, config, normalizer, state=state)
    with pytest.raises(DataError, match="changed statistics"):
        Stream(sets, PHASES, CONFIG, state=state)


def test_a_batch_holds_the_windows_that_it_names(sets, normalizer):
    config = StreamConfig(8, 2 * 4096, image_size=56, augment=None)
    batch = _take(sets, 1, config, normalizer=normalizer)[0][0]
    robot = sets["robot"]
    windows = []
    for number in range(len(robot)):
        episode = robot.episode(number)
        for step in range(episode.num_steps):
            window = make_window(episode, step, SPEC)
            windows += [window, mirror_single_arm(window)]
    rows = np.flatnonzero(batch["source"] == 0)
    assert len(rows)
    sides = set()
    for row in rows:
        action = denormalize_action(batch["action"][row], normalizer.action, SPEC)
        arm = int(batch["state"]["arm_mask"][row].argmax())
        sides.add(arm)
        mask = batch["action_mask"][row]
        joints = batch["state"]["joints"][row, arm, :7]
        best = min(
            (w for w in windows if w.state["arm_mask"][arm]),
            key=lambda w: np.abs(
                normalize_state(w.state["joint_pos"], normalizer.action.state["joint_pos"])[arm, :7]
                - joints
            ).max(),
        )
        assert best.instruction == batch["instruction"][row]
        np.testing.assert_array_equal(best.action_mask, mask)
        np.testing.assert_allclose(action[mask], best.action[mask], atol=1e-6)
        assert not batch["action"][row][~mask].any()
        wrist = ("left_wrist", "right_wrist")[arm]
        assert set(best.images) == {"head", wrist}
        assert batch["view_mask"][row].tolist() == [True, arm == 0, arm == 1]
        decoded = simplejpeg.decode_jpeg(best.images["head"])
        fit = Fit(32, 48, 56)
        top = fit.box[0]
        np.testing.assert_allclose(batch["images"][row, 0, top + 5, 20], decoded[9, 9], atol=2)
        assert not batch["images"][row, 0, : top - 1].any()
    assert sides == {0, 1}
    for row in np.flatnonzero(batch["source"] == 2):
        assert "mug" in batch["questions"][row][0].prompt
        assert "point_2d" in batch["questions"][row][0].answer
        assert batch["view_mask"][row].tolist() == [True, False, False]
        assert not batch["action_mask"][row].any()
    assert batch["embodiment_id"][rows[0]] == embodiment_id("franka")


def test_an_epoch_shows_every_sample_once(sets):
    only = {"robot": sets["robot"]}
    config = StreamConfig(26, 10**6, image_size=28, augment=None, random_side=False)
    stream = Stream(only, [Phase(0.0, {"robot": 1.0})], config)
    epochs = [next(stream) for _ in range(2)]
    for batch in epochs:
        shown = {(t, s.tobytes()) for t, s in zip(batch["instruction"], batch["state"]["joint_pos"],
                                                  strict=True)}  # fmt: skip
        assert len(shown) == 26
    assert (epochs[0]["state"]["joint_pos"] != epochs[1]["state"]["joint_pos"]).any()


def test_a_question_about_a_robots_views_shows_them_in_their_places(tmp_path):
    rng = np.random.default_rng(1)
    for name in ("wrist", "head"):
        (tmp_path / f"{name}.jpg").write_bytes(_jpeg(rng, 40, 60))
    record = {
        "id": "v", "type": "general_vqa", "images": ["wrist.jpg", "head.jpg"],
        "views": ["right_wrist", "head"], "question": "Which way?", "answer": "Left.",
    }  # fmt: skip
    (tmp_path / "pool.jsonl").write_text(json.dumps(record))
    room = Room(tokens=500, images=3, image_tokens=10, count=lambda record: 10)
    pool = {"asked": Packed(Pool(tmp_path / "pool.jsonl"), room, seed=0)}
    batch = next(Stream(pool, [Phase(0.0, {"asked": 1.0})], StreamConfig(1, 4, image_size=56)))
    assert batch["view_mask"].tolist() == [[True, False, True]]
    assert batch["images"].reshape(3, -1).any(axis=1).tolist() == [True, False, True]
    assert batch["questions"] == [[Question("Which way?", "Left.", (2, 0), robot=True)]]
    head = decode((tmp_path / "head.jpg").read_bytes())
    wanted = np.zeros((56, 56, 3), np.uint8)
    fit_into(wanted, head, "pad")
    np.testing.assert_array_equal(batch["images"][0, 0], wanted)


def test_a_question_that_says_its_robots_state_has_it_normalised_as_windows_have(tmp_path):
    robot = open_prepared(
        DatasetConfig(str(write_robot(tmp_path)), "franka_sim_pick", str(tmp_path / "w"))
    )
    statistics = measure(robot, SPEC).statistics("robot")
    normalizer = Normalizer(statistics, {robot.row.embodiment: statistics}, SPEC)
    window = make_window(robot.episode(0), 3, SPEC)
    (tmp_path / "a.jpg").write_bytes(_jpeg(np.random.default_rng(1), 40, 60))
    record = {
        "id": "v", "type": "general_vqa", "images": ["a.jpg"], "views": ["head"],
        "question": "Which way?", "answer": "Left.",
        "state": write_state(window.embodiment, window.state),
    }  # fmt: skip
    (tmp_path / "pool.jsonl").write_text(json.dumps(record))
    pool = {"asked": Pool(tmp_path / "pool.jsonl")}
    phases, config = [Phase(0.0, {"asked": 1.0})], StreamConfig(1, 4, image_size=56)
    batch = next(Stream(pool, phases, config, normalizer))
    number = embodiment_id(window.embodiment)
    assert batch["embodiment_id"].tolist() == [number]
    rows = {key: value[None] for key, value in window.state.items()}
    wanted = normalizer.normalize_state(rows, np.array([number]))
    assert np.abs(wanted["ee"]).max() > 0.1
    for key, value in wanted.items():
        np.testing.assert_allclose(batch["state"][key], value, atol=1e-4, err_msg=key)
    (tmp_path / "pool.jsonl").write_text(json.dumps(record | {"state": {
        "embodiment": "ur5", "arms": {"right": {"grip_open": 1}},
    }}))  # fmt: skip
    pool = {"asked": Pool(tmp_path / "pool.jsonl")}
    with pytest.raises(DataError, match="line 1: field 'state' is of 'ur5': expected a robot of"):
        next(Stream(pool, phases, config, normalizer))


def test_a_bad_image_is_masked_counted_and_named_and_too_many_stop_the_run(tmp_path):
    path = write_robot(tmp_path, bad_images=(3,), has_head=False)
    robot = {
        "robot": open_prepared(DatasetConfig(str(path), "franka_sim_pick", str(tmp_path / "w")))
    }
    config = StreamConfig(26, 10**6, image_size=28, random_side=False, bad_images=0.2)
    stream = Stream(robot, [Phase(0.0, {"robot": 1.0})], config, num_workers=2)
    batch = next(stream)
    assert stream.log.counts == {"bad_image": 3}
    assert "step 3, view 'right_wrist'" in stream.log.examples["bad_image"][0]
    assert (~batch["view_mask"][:, 2]).sum() == 3
    assert not batch["images"][~batch["view_mask"]].any()
    stream.close()
    strict = StreamConfig(52, 10**6, image_size=28, bad_images=0.01)
    stream = Stream(robot, [Phase(0.0, {"robot": 1.0})], strict)
    with pytest.raises(DataError, match="records dropped, more than the budget of 1.0%"):
        _ = [next(stream) for _ in range(50)]


def test_a_video_that_is_cut_short_masks_its_frames_and_the_run_goes_on(tmp_path):
    path = write_video(tmp_path / "v" / "a.mp4", [6 * i for i in range(40)], fps=5)
    entry = DatasetConfig(str(tmp_path / "v"), "video", str(tmp_path / "w"), format="video")
    video = {"video": open_prepared(entry)}
    data = path.read_bytes()
    begin = data.index(b"mdat")
    path.write_bytes(data[: begin + 4] + bytes(len(data) - begin - 4))  # pictures gone, size kept
    config = StreamConfig(40, 10**6, image_size=28, bad_images=1.0)
    stream = Stream(video, [Phase(0.0, {"video": 1.0})], config)
    batch = next(stream)
    assert stream.log.counts == {"bad_image": 40}
    assert "a.mp4, frame" in stream.log.examples["bad_image"][0]
    assert not batch["view_mask"].any()
    assert not batch["images"].any()


def test_clips_for_the_latent_tokenizer(sets):
    config = StreamConfig(4, 10**6, image_size=28, content="clips")
    videos = {"video": sets["video"]}
    batch = next(Stream(videos, [Phase(0.0, {"video": 1.0})], config))
    assert batch["images"].shape == (4, 6, 28, 28, 3)
    for row in range(4):
        levels = batch["images"][row].mean(axis=(1, 2, 3)).round() / 9
        for k in range(5):
            step = levels[k + 1] - levels[k]
            assert abs(step - (1 if batch["clip_mask"][row, k] else 0)) < 0.6
    mixed = Stream(sets, PHASES, StreamConfig(8, 10**6, image_size=28, content="clips"))
    with pytest.raises(DataError, match="'points' has no video"):
        _ = [next(mixed) for _ in range(5)]


def test_sizes_that_do_not_fit_are_refused(sets):
    with pytest.raises(ValueError, match="hosts that divide the batch"):
        Stream(sets, PHASES, CONFIG, num_hosts=3)
    with pytest.raises(ValueError, match="shares that sum to 1"):
        Stream(sets, [Phase(0.0, {"robot": 0.5})], CONFIG)


def test_statistics_merge_over_parts_of_the_episodes(sets, tmp_path):
    whole = measure(sets["robot"], SPEC)
    parts = [measure(sets["robot"], SPEC, episodes=[i]) for i in (2, 0, 1)]
    parts[1].save(tmp_path / "part.npz")
    merged = Measured.load(tmp_path / "part.npz", SPEC)
    merged.merge(parts[0])
    merged.merge(parts[2])
    one, two = whole.statistics("a"), merged.statistics("a")
    assert one.num_steps == two.num_steps == 26
    for field in ("count", "min", "max", "q01", "q99"):
        np.testing.assert_array_equal(getattr(one.action, field), getattr(two.action, field))
    for field in ("mean", "std"):
        np.testing.assert_allclose(
            getattr(one.action, field), getattr(two.action, field), rtol=1e-12, atol=1e-18
        )
    np.testing.assert_array_equal(one.action.mean[:, :10], one.action.mean[:, 10:])  # both sides
    with pytest.raises(DataError, match="another action spec"):
        Measured.load(tmp_path / "part.npz", ActionSpec(chunk_len=4))
    (tmp_path / "part.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match="part.npz: not what"):
        Measured.load(tmp_path / "part.npz", SPEC)


def test_a_data_set_is_prepared_once_and_again_when_its_row_changes(tmp_path):
    path = write_robot(tmp_path)
    config = DatasetConfig(str(path), "franka_sim_pick", str(tmp_path / "w"))
    first = open_prepared(config)
    made = (tmp_path / "w" / "prepared" / "manifest.json").stat().st_mtime_ns
    assert open_prepared(config).digest == first.digest
    assert (tmp_path / "w" / "prepared" / "manifest.json").stat().st_mtime_ns == made
    other = DatasetConfig(
        str(path), "franka_sim_pick", str(tmp_path / "w"), options={"head": "image_base"}
    )
    with pytest.raises(DataError, match="view 'head': key 'steps/observation/image_base' is none"):
        open_prepared(other)  # this data set has no such camera
    assert detect_format(str(path)) == "rlds"
    with pytest.raises(DataError, match="neither dataset_info.json"):
        detect_format(str(tmp_path))
    with pytest.raises(DataError, match="HDF5 needs a layout"):
        open_source(DatasetConfig(str(path), "x", str(tmp_path), format="hdf5"))
