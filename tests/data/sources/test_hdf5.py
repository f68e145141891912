import json

import h5py
import numpy as np
import pytest
import simplejpeg

from gear_jax.data.sources.hdf5 import Hdf5Source
from gear_jax.data.tfrecord import DataError
from tests.data.sources.test_video import write_video


def write_agibot(root, steps=6):
    """AgiBot World: numbers in HDF5, cameras in mp4, tasks in JSON."""
    path = root / "proprio_stats" / "327" / "648642" / "proprio_stats.h5"
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    quat = np.tile([0.0, 0.0, 0.0, 1.0], (steps, 2, 1))  # xyzw
    with h5py.File(path, "w") as file:
        file["state/end/position"] = 0.01 * np.cumsum(rng.standard_normal((steps, 2, 3)), axis=0)
        file["state/end/orientation"] = quat
        file["state/joint/position"] = rng.standard_normal((steps, 14))
        file["state/effector/position"] = np.tile([120.0, 0.0], (steps, 1))  # mm
        file["action/effector/position"] = np.tile([0.0, 1.0], (steps, 1))  # 0 open, 1 closed
    (root / "task_info").mkdir()
    entry = {"episode_id": 648642, "task_name": "Pack in the supermarket"}
    (root / "task_info" / "task_327.json").write_text(json.dumps([entry]))
    videos = root / "observations" / "327" / "648642" / "videos"
    for name in ("head", "hand_left"):  # the right wrist camera is missing
        write_video(videos / f"{name}_color.mp4", [20 * i for i in range(steps)], fps=30)
    return root


def write_robomind(root, steps=5):
    """RoboMIND franka_3rgb: encoded BGR images, xyz + rpy, the task in the folder's name."""
    path = root / "pick_the_red_cube/success_episodes/train/1017/data/trajectory.hdf5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["puppet/end_effector"] = np.tile([0.4, 0, 0.3, 0, 0, np.pi / 2], (steps, 1))
        file["puppet/joint_position"] = np.tile(np.r_[np.zeros(7), 0.8], (steps, 1))
        file["master/joint_position"] = np.tile(np.r_[np.zeros(7), 1.0], (steps, 1))
        red = np.zeros((16, 16, 3), np.uint8)
        red[..., 2] = 255  # BGR
        images = [np.frombuffer(simplejpeg.encode_jpeg(red), np.uint8)] * steps
        kind = h5py.vlen_dtype(np.uint8)
        stored = file.create_dataset("observations/rgb_images/camera_top", (steps,), dtype=kind)
        for step, image in enumerate(images):
            stored[step] = image
    return root


def write_libero(root, lengths=(4, 3)):
    """LIBERO: one file a task, raw images from the bottom up."""
    root.mkdir(parents=True, exist_ok=True)
    with h5py.File(root / "task_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": '"open the drawer"'})
        for number, steps in enumerate(lengths):
            demo = data.create_group(f"demo_{number * 9}")  # demo_0, demo_9: numbers, not words
            demo["actions"] = np.tile([0, 0, 0, 0, 0, 0, -1.0], (steps, 1))
            demo["obs/ee_states"] = np.tile([0.1, 0.2, 0.3, np.pi, 0, 0], (steps, 1))
            demo["obs/joint_states"] = np.zeros((steps, 7))
            demo["obs/gripper_states"] = np.tile([0.04, -0.04], (steps, 1))
            image = np.zeros((steps, 12, 12, 3), np.uint8)
            image[:, 0] = 255  # the lowest row is stored first
            demo["obs/agentview_rgb"] = image
            demo["obs/eye_in_hand_rgb"] = image
    return root


def test_agibot(tmp_path):
    source = Hdf5Source(write_agibot(tmp_path), "agibot")
    raw = source.episode(0)
    assert (len(source), raw.num_steps, raw.fps) == (1, 6, 30.0)
    assert raw.text("instruction") == "Pack in the supermarket"
    assert raw.read("state/end/orientation").shape == (6, 2, 4)
    assert raw.has("head_color.mp4")
    assert not raw.has("hand_right_color.mp4")
    np.testing.assert_allclose(raw.images("head_color.mp4")[4].mean(), 80, atol=4)
    (tmp_path / "task_info" / "task_327.json").write_text("[]")
    with pytest.raises(DataError, match="task_327.json: has no task_name of episode 648642"):
        raw.text("instruction")


def test_robomind(tmp_path):
    raw = Hdf5Source(write_robomind(tmp_path), "robomind").episode(0)
    assert (raw.num_steps, raw.fps) == (5, None)
    assert raw.text("instruction") == "pick the red cube"
    image = raw.images("observations/rgb_images/camera_top")[3]
    assert image[:2] == b"\xff\xd8"


def test_libero(tmp_path):
    source = Hdf5Source(write_libero(tmp_path), "libero")
    assert [source.episode(i).num_steps for i in range(2)] == [4, 3]
    assert source.episode(1).episode_id == "task_demo.hdf5:data/demo_9"
    assert source.episode(0).text("instruction") == "open the drawer"
    assert source.episode(0).images("obs/agentview_rgb")[2].shape == (12, 12, 3)


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(DataError, match="layout 'x': expected one of"):
        Hdf5Source(tmp_path, "x")
    with pytest.raises(DataError, match="no file matches"):
        Hdf5Source(tmp_path, "libero")
    (tmp_path / "a.hdf5").write_bytes(b"version https://git-lfs.github.com")
    with pytest.raises(DataError, match="a.hdf5: not a readable HDF5"):
        Hdf5Source(tmp_path, "libero")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["other"] = [1]
    with pytest.raises(DataError, match="a.hdf5: has no group 'data'"):
        Hdf5Source(tmp_path, "robomimic")
