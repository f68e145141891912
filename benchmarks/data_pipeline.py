"""The full data pipeline against its floor, JPEG decoding and resizing alone, and against tf.data.

    python -m benchmarks.data_pipeline [--pairs 5] [--batches 12]

Makes RLDS episodes of three 256 x 256 views (19 kB JPEGs) at 15 Hz. A batch is 32 samples of three
views at 224 or 448 px, a 30-step chunk resampled to 30 Hz, the state and the instruction. The floor
decodes and resizes the same images, already in memory, with the same libraries, in one process.
Ours is the whole stream: global shuffle, byte-range reads, windows, batching, and the worker
processes with what they hand over. CPU time of all processes, in turns with the floor, buffers full
before and after; median of the ratios. Where TensorFlow is installed, a tf.data pipeline does the
same work in the same run.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import cv2
import numpy as np
import psutil
import simplejpeg

from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.images import AugmentConfig
from gear_jax.data.mixtures import Phase
from gear_jax.data.pipeline import Stream, StreamConfig
from gear_jax.data.rlds_writer import Column, RldsWriter

BATCH, STEPS, SIDE, CHUNK = 32, 200, 256, 30
VIEWS = ("image_base_2", "image_ego", "image_extra")
LIMITS = {224: 1.3, 448: 1.6, "tf.data": 1.0}


def main():
    """Print a line per way and one JSON line; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    figures, fine = {}, True
    with tempfile.TemporaryDirectory() as folder:
        prepared = make(pathlib.Path(folder), 24)
        for size in (224, 448):
            for workers in (0, 2):
                ours = ratio(prepared, size, workers, None, args)
                report(f"{size} px, {workers} workers", ours, LIMITS[size])
                figures[f"{size}px_{workers}_workers"] = ours["ratio"]
                fine &= ours["ratio"] <= LIMITS[size]
            augmented = ratio(prepared, size, 0, AugmentConfig(), args)
            report(f"{size} px, augmented, not in the limit", augmented, None)
            figures[f"{size}px_augmented"] = augmented["ratio"]
            theirs = against_tf(prepared, size, args)
            if theirs is not None:
                print(f"{size} px: {theirs:.2f} samples of ours per CPU time of one of tf.data's")
                figures[f"{size}px_times_tf_data"] = theirs
                fine &= theirs >= LIMITS["tf.data"]
        figures["resident_mb"] = [resident(make(pathlib.Path(folder), 3)), resident(prepared)]
        print("resident MB with 3 and with 24 episodes:", figures["resident_mb"])
    limits = {str(key): value for key, value in LIMITS.items()}
    print(json.dumps({"ok": fine, **figures, "limits": limits, "load": os.getloadavg()}))
    return 0 if fine else 1


def make(folder, episodes):
    """An RLDS data set, indexed and prepared."""
    columns = {f"steps/observation/{view}": Column("image", (SIDE, SIDE, 3)) for view in VIEWS}
    columns |= {
        "steps/observation/eef_pos": Column("tensor", (3,)),
        "steps/observation/eef_quat_wxyz": Column("tensor", (4,)),
        "steps/observation/joint_pos": Column("tensor", (7,)),
        "steps/observation/gripper_width": Column("tensor", ()),
        "steps/action": Column("tensor", (8,)),
        "steps/language_instruction": Column("text"),
    }
    rng = np.random.default_rng(0)
    pool = [picture(rng) for _ in range(60)]
    print(f"{episodes} episodes, JPEGs of {np.mean([len(one) for one in pool]) / 1e3:.1f} kB")
    with RldsWriter(folder, f"toy_{episodes}", columns) as writer:
        for _ in range(episodes):
            path = np.cumsum(0.005 * rng.standard_normal((STEPS, 3)), axis=0)
            quat = rng.standard_normal(4) + np.cumsum(
                0.02 * rng.standard_normal((STEPS, 4)), axis=0
            )
            step = {
                "steps/observation/eef_pos": path,
                "steps/observation/eef_quat_wxyz": quat
                / np.linalg.norm(quat, axis=1, keepdims=True),
                "steps/observation/joint_pos": rng.standard_normal((STEPS, 7)),
                "steps/observation/gripper_width": rng.random(STEPS),
                "steps/action": rng.standard_normal((STEPS, 8)),
                "steps/language_instruction": ["pick up the block"] * STEPS,
            }
            for view in VIEWS:
                step[f"steps/observation/{view}"] = [pool[i] for i in rng.integers(0, 60, STEPS)]
            writer.add(step)
    row = {
        "name": "toy",
        "embodiment": "franka",
        "fps": 15.0,
        "arms": {
            "right": {
                "pose": {
                    "position": "steps/observation/eef_pos",
                    "rotation": "steps/observation/eef_quat_wxyz",
                    "convention": "wxyz",
                },
                "joints": "steps/observation/joint_pos",
                "grip_open": {
                    "column": "steps/observation/gripper_width",
                    "closed": 0.0,
                    "open": 1.0,
                },
            }
        },
        "views": {
            view: {"key": f"steps/observation/{key}"}
            for view, key in zip(("head", "left_wrist", "right_wrist"), VIEWS, strict=True)
        },
        "instruction": ["steps/language_instruction"],
    }
    (folder / "row.json").write_text(json.dumps(row))
    path = folder / f"toy_{episodes}" / "1.0.0"
    work = folder / f"work_{episodes}"
    return open_prepared(DatasetConfig(str(path), str(folder / "row.json"), str(work)))


def picture(rng):
    """A JPEG of about 19 kB, as of a real camera: soft shapes and a little grain."""
    coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
    image = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    image += 0.7 * rng.standard_normal((SIDE, SIDE, 1)).astype(np.float32)
    return simplejpeg.encode_jpeg(image.clip(0, 255).astype(np.uint8), 95)


def stream(prepared, size, workers, augment, seed=0):
    """Our batches."""
    config = StreamConfig(BATCH, 10**6, image_size=size, augment=augment, seed=seed)
    return Stream({"toy": prepared}, [Phase(0.0, {"toy": 1.0})], config, num_workers=workers)


def cpu_seconds():
    """CPU time of this process and of those that it started."""
    me = psutil.Process()
    total = sum(me.cpu_times()[:2])
    return total + sum(sum(child.cpu_times()[:2]) for child in me.children(recursive=True))


def settle():
    """Wait until the workers have filled their buffers and stopped; the CPU time then."""
    before = cpu_seconds()
    while True:
        time.sleep(0.2)
        now = cpu_seconds()
        if now - before <= 0.02:
            return now
        before = now


def ratio(prepared, size, workers, augment, args):
    """Median and quartiles of ours / floor, in turns; milliseconds of CPU a sample."""
    batches = stream(prepared, size, workers, augment)
    for _ in range(6):
        next(batches)  # workers start, buffers fill
    images = floor_images(prepared)
    pairs = []
    for turn in range(args.pairs):
        measured = {}
        for way in ("ours", "floor") if turn % 2 else ("floor", "ours"):
            begin = settle()
            if way == "ours":
                for _ in range(args.batches):
                    next(batches)
            else:
                for n in range(args.batches * BATCH):
                    for data in images[n % len(images)]:
                        floor(data, size)
            measured[way] = (settle() - begin) / args.batches / BATCH * 1e3
        pairs.append(measured)
    batches.close()
    ratios = sorted(pair["ours"] / pair["floor"] for pair in pairs)
    return {
        "ratio": statistics.median(ratios),
        "quartiles": np.quantile(ratios, (0.25, 0.75)).round(2).tolist(),
        "ours_ms": statistics.median(pair["ours"] for pair in pairs),
        "floor_ms": statistics.median(pair["floor"] for pair in pairs),
    }


def floor(data, size):
    """What no pipeline can do without."""
    return cv2.resize(simplejpeg.decode_jpeg(data, "RGB"), (size, size))


def floor_images(prepared):
    """Encoded images of some samples, read before."""
    places = [prepared.locate(n) for n in range(0, prepared.num_steps, 7)]
    episodes = [(prepared.episode(number), step) for number, step in places]
    return [[view[step] for view in episode.views.values()] for episode, step in episodes]


def report(name, got, limit):
    """One line."""
    low, high = got["quartiles"]
    print(f"{name:<36} {got['ours_ms']:6.2f} CPU ms a sample, floor {got['floor_ms']:6.2f}, ratio "
          f"{got['ratio']:.2f} ({low:.2f} .. {high:.2f})"
          + (f", limit {limit}" if limit else ""))  # fmt: skip


def resident(prepared):
    """Megabytes of this process that are not shared files, after a few batches."""
    batches = stream(prepared, 224, 0, None)
    for _ in range(8):
        next(batches)
    used = psutil.Process().memory_full_info().uss
    batches.close()
    return round(used / 1e6)


def against_tf(prepared, size, args):
    """Samples per CPU second, ours over tf.data's; None without TensorFlow."""
    try:
        import tensorflow as tf
    except ImportError:
        print(f"{size} px: TensorFlow is not installed, so tf.data is not measured")
        return None
    theirs = iter(tf_pipeline(tf, prepared, size))
    ours = stream(prepared, size, 2, None)
    ways = {"ours": lambda: next(ours), "theirs": lambda: next(theirs)}
    ratios = []
    for _ in range(6):
        for way in ways.values():
            way()
    for turn in range(args.pairs):
        spent = {}
        for way in ways if turn % 2 else reversed(ways):
            begin = settle()
            for _ in range(args.batches):
                ways[way]()
            spent[way] = settle() - begin
        ratios.append(spent["theirs"] / spent["ours"])
    ours.close()
    return statistics.median(ratios)


def tf_pipeline(tf, prepared, size):
    """As Octo and OpenVLA do: whole records, chunks, a shuffle buffer of frames, then decoding."""
    keys = {f"steps/observation/{view}": tf.io.VarLenFeature(tf.string) for view in VIEWS}
    low = {"eef_pos": 3, "eef_quat_wxyz": 4, "joint_pos": 7}
    keys |= {f"steps/observation/{name}": tf.io.FixedLenFeature([STEPS, n], tf.float32)
             for name, n in low.items()}  # fmt: skip
    keys["steps/language_instruction"] = tf.io.VarLenFeature(tf.string)

    def parse(record):
        found = tf.io.parse_single_example(record, keys)
        images = [tf.sparse.to_dense(found[f"steps/observation/{view}"]) for view in VIEWS]
        pose = tf.concat([found[f"steps/observation/{n}"] for n in ("eef_pos", "eef_quat_wxyz")], 1)
        ahead = tf.minimum(tf.range(STEPS)[:, None] + tf.range(CHUNK)[None], STEPS - 1)
        text = tf.sparse.to_dense(found["steps/language_instruction"])
        joints = found["steps/observation/joint_pos"]
        steps = {"images": tf.stack(images, 1), "chunk": tf.gather(pose, ahead), "text": text}
        return tf.data.Dataset.from_tensor_slices({**steps, "joints": joints})

    def decode(step):
        def one(data):
            image = tf.io.decode_jpeg(data, channels=3)
            return tf.cast(tf.image.resize(image, (size, size)), tf.uint8)

        return {**step, "images": tf.stack([one(step["images"][i]) for i in range(len(VIEWS))])}

    files = [str(path) for path in prepared.source.index.shards]
    options = tf.data.Options()
    options.threading.private_threadpool_size = 2
    data = tf.data.TFRecordDataset(files).repeat().flat_map(parse).shuffle(1000)
    data = data.map(decode, num_parallel_calls=2).batch(BATCH).prefetch(1)
    return data.with_options(options).as_numpy_iterator()


if __name__ == "__main__":
    raise SystemExit(main())
