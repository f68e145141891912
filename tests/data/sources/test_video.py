import av
import numpy as np
import pytest

from gear_jax.data.sources.video import VideoFrames, probe
from gear_jax.data.sources.video_folder import VideoFolderSource
from gear_jax.data.tfrecord import DataError


def write_video(path, levels, fps=10, codec="libx264", size=64):
    """A video whose frame i is a flat grey of levels[i]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "7"} if codec == "libx264" else {"preset": "12"}
        for level in levels:
            image = np.full((size, size, 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


LEVELS = [10 * i for i in range(25)]


def _levels(frames):
    return [int(frame.mean().round()) for frame in frames]


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_every_frame_is_found_by_its_number(tmp_path, codec):
    path = write_video(tmp_path / "a.mp4", LEVELS, codec=codec)
    assert probe(path) == (25, 10.0)
    frames = VideoFrames(path, 25, 10.0)
    np.testing.assert_allclose(_levels(frames), LEVELS, atol=4)
    for step in (24, 0, 13, 7, 6, 8):
        np.testing.assert_array_equal(frames[step], list(frames)[step])


def test_a_stretch_of_a_longer_file_begins_at_its_time(tmp_path):
    path = write_video(tmp_path / "a.mp4", LEVELS)
    part = VideoFrames(path, 5, 10.0, start=1.2)
    np.testing.assert_allclose(_levels(part), LEVELS[12:17], atol=4)
    np.testing.assert_allclose(_levels([part[3]]), [150], atol=4)
    with pytest.raises(IndexError, match="frame 5"):
        part[5]


def test_a_file_that_ends_early_or_is_no_video_is_named(tmp_path):
    path = write_video(tmp_path / "a.mp4", LEVELS)
    with pytest.raises(DataError, match="a.mp4, frame 25: the video ends before, expected 30"):
        list(VideoFrames(path, 30, 10.0))
    (tmp_path / "b.mp4").write_bytes(b"version https://git-lfs")
    with pytest.raises(DataError, match="b.mp4"):
        VideoFrames(tmp_path / "b.mp4", 3, 10.0)[0]
    with pytest.raises(DataError, match="b.mp4: not a readable video"):
        probe(tmp_path / "b.mp4")


def test_a_folder_of_clips_is_one_episode_a_file(tmp_path):
    write_video(tmp_path / "b" / "two.mp4", LEVELS[:4], fps=5)
    write_video(tmp_path / "a.mp4", LEVELS[:3])
    (tmp_path / "instructions.jsonl").write_text('{"file": "b/two.mp4", "instruction": "wipe"}\n')
    source = VideoFolderSource(tmp_path)
    assert [source.episode(i).episode_id for i in range(2)] == ["a.mp4", "b/two.mp4"]
    clip = source.episode(1)
    assert (clip.num_steps, clip.fps, clip.text("instruction")) == (4, 5.0, "wipe")
    assert source.episode(0).text("instruction") == ""
    np.testing.assert_allclose(_levels(clip.images("video")), LEVELS[:4], atol=4)
    (tmp_path / "instructions.jsonl").write_text('{"file": "c.mp4", "instruction": "x"}\n')
    with pytest.raises(DataError, match="line 1: no clip 'c.mp4'"):
        VideoFolderSource(tmp_path)
    with pytest.raises(DataError, match="no file matches"):
        VideoFolderSource(tmp_path / "b", "*.avi")


def test_real_clips(samples):
    source = VideoFolderSource(samples / "lapa_real_clips")
    assert [(c.episode_id, c.num_steps, round(c.fps)) for c in map(source.episode, range(3))] == [
        ("bridge_real_1.mp4", 37, 5),
        ("bridge_real_2.mp4", 47, 5),
        ("rt1_real_standing_coke_can_1.mp4", 16, 17),
    ]
    frames = source.episode(2).images("video")
    np.testing.assert_array_equal(frames[9], list(frames)[9])
