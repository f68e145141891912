import numpy as np
import pytest

from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.sources import reach
from gear_jax.data.sources.reach import ReachSource
from gear_jax.data.tfrecord import DataError


def test_an_episode_is_a_function_of_its_number_and_the_seed():
    one, again, other = ReachSource(), ReachSource(), ReachSource(seed=1)
    frame = one.episode(7).images("head")[3]
    np.testing.assert_array_equal(frame, again.episode(7).images("head")[3])
    assert (frame != one.episode(8).images("head")[3]).any()
    assert (frame != other.episode(7).images("head")[3]).any()
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()


def test_the_hand_ends_on_the_disc_that_the_instruction_names_and_closes_there():
    source = ReachSource(num_targets=3)
    for number in range(5):
        episode = source.episode(number)
        scene, pose = episode.scene, episode.read("pose")
        assert scene.colours[scene.named] in episode.text("instruction")
        np.testing.assert_allclose(pose[-1, :2], scene.places[scene.named], atol=1e-9)
        assert episode.read("grip")[[0, -1], 0].tolist() == [1.0, 0.0]
        wrist = episode.images("wrist")[episode.num_steps - 1]
        assert tuple(wrist[28, 28]) == reach.COLOURS[scene.colours[scene.named]]


def test_it_is_read_like_a_robot_s_recording(tmp_path):
    config = DatasetConfig("reach", "reach", str(tmp_path), "reach", drawing={"num_episodes": 3})
    prepared = open_prepared(config)
    episode = prepared.episode(1)
    raw = ReachSource(num_episodes=3).episode(1)
    np.testing.assert_allclose(episode.arms["right"].ee_pos, raw.read("pose")[:, :3], atol=1e-6)
    np.testing.assert_array_equal(episode.views["head"][4], raw.images("head")[4])
    assert episode.instruction == raw.scene.instruction


def test_what_is_not_there_is_refused():
    with pytest.raises(DataError, match="no episode 200 of 200"):
        ReachSource().episode(200)
    with pytest.raises(DataError, match="key 'depth' has no images"):
        ReachSource().episode(0).images("depth")
