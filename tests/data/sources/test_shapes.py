import numpy as np
import pytest

from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.prepared import hold_out
from gear_jax.data.sources.shapes import ShapesSource
from gear_jax.data.tfrecord import DataError


def test_an_episode_is_a_function_of_its_number_and_the_seed():
    one, again, other = ShapesSource(), ShapesSource(), ShapesSource(seed=1)
    frames = np.asarray(one.episode(7).images("video"))
    np.testing.assert_array_equal(frames, np.asarray(again.episode(7).images("video")))
    assert (frames != np.asarray(one.episode(8).images("video"))).any()
    assert (frames != np.asarray(other.episode(7).images("video"))).any()
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()


def test_the_velocity_is_that_of_the_coloured_pixels():
    source = ShapesSource(num_movers=2, spread=0.0, image_size=64, flicker=0.0)
    for number in range(5):
        episode = source.episode(number)
        frames = np.asarray(episode.images("video")).astype(float)
        colour = frames.max(axis=-1) - frames.min(axis=-1)  # grey shapes have none
        y, x = np.mgrid[:64, :64]
        mass = colour.sum(axis=(1, 2))
        centre = np.stack([(colour * a).sum(axis=(1, 2)) / mass for a in (x, y)], axis=1)
        whole = np.abs(colour[:, [0, -1]]).sum(axis=(1, 2)) + colour[:, :, [0, -1]].sum(axis=(1, 2))
        seen = (whole[1:] == 0) & (whole[:-1] == 0)  # not cut by the border
        moves = np.diff(centre, axis=0) / 64 * source.fps
        velocity = episode.read("velocity")
        assert velocity.shape == (12, 2)
        np.testing.assert_allclose(moves[seen], velocity[:-1][seen], atol=0.05)
        assert seen.sum() >= 3


def test_velocities_turn_and_reverse():
    source = ShapesSource(num_steps=200, turn=0.0, reversal=0.3)
    velocity = source.episode(0).read("velocity")
    assert np.abs(velocity).max() <= source.speed + 1e-9
    same = (velocity[1:] * velocity[:-1]).sum(axis=1)
    assert 0.15 < np.mean(same < 0) < 0.6


def test_they_are_a_data_set_like_any_other(tmp_path):
    config = DatasetConfig("shapes", "shapes", str(tmp_path), format="shapes",
                           drawing={"num_episodes": 40, "num_steps": 6})  # fmt: skip
    prepared = open_prepared(config)
    assert (len(prepared), prepared.num_steps) == (40, 240)
    assert prepared.episode(3).views["head"][2].shape == (32, 32, 3)
    with pytest.raises(DataError, match="no episode 40 of 40"):
        prepared.source.episode(40)
    train, held = hold_out(prepared, 0.2)
    assert len(train) + len(held) == 40
    assert 2 <= len(held) <= 16
    names = [{one.episode(i).episode_id for i in range(len(one))} for one in (train, held)]
    assert not names[0] & names[1]
    assert train.digest != held.digest
    assert train.whole_digest == held.whole_digest == prepared.digest
    number, step = held.locate(8)
    assert (number, step) == (1, 2)
    row = held.row_of(number, step)
    assert prepared.locate(row)[1] == 2
    assert prepared.episode(prepared.locate(row)[0]).episode_id == held.episode(1).episode_id
    with pytest.raises(ValueError, match="holding out 0 of 40 episodes leaves 40 and 0"):
        hold_out(prepared, 0.0)
