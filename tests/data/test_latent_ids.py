import pickle

import numpy as np
import pytest

from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.latent_ids import LatentIds, LatentSpec, LatentWriter
from gear_jax.data.mixtures import Phase
from gear_jax.data.pipeline import Stream, StreamConfig
from gear_jax.data.prepared import hold_out
from gear_jax.data.tfrecord import DataError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    work = tmp_path_factory.mktemp("shapes")
    drawing = {"num_episodes": 30, "num_steps": 7, "image_size": 16}
    return open_prepared(
        DatasetConfig("shapes", "shapes", str(work), format="shapes", drawing=drawing)
    )


def _spec(prepared, **changes):
    fields = {"data": prepared.whole_digest, "tokenizer": "t1", "steps": 210, "transitions": 5,
              "codes": 4, "vocabulary": 16, "part_steps": 50}  # fmt: skip
    return LatentSpec(**{**fields, **changes})


def _ids(part):
    """Something that tells every step apart; the last transition is outside for odd steps."""
    steps = np.arange(part.start, part.stop)[:, None, None]
    ids = (steps + 3 * np.arange(5)[:, None] + np.arange(4)) % 16
    ids[steps[:, 0, 0] % 2 == 1, 4] = -1
    return ids


def _write(directory, prepared, order=None):
    writer = LatentWriter(directory, _spec(prepared))
    for part in order or writer.missing():
        writer.write(part, _ids(part))
    return writer


def test_parts_made_in_any_order_by_several_join_to_the_same_bytes(prepared, tmp_path):
    parts = _spec(prepared).parts
    assert [len(part) for part in parts] == [50, 50, 50, 50, 10]
    one = _write(tmp_path / "one", prepared)
    assert one.finish()
    first = _write(tmp_path / "two", prepared, [parts[3], parts[0]])
    assert not first.finish()
    second = LatentWriter(tmp_path / "two", _spec(prepared))  # another process, or one restarted
    assert second.missing() == [parts[1], parts[2], parts[4]]
    for part in second.missing():
        second.write(part, _ids(part))
    assert second.finish()
    names = ["ids.bin", "manifest.json"]
    for name in names:
        read = [(tmp_path / d / name).read_bytes() for d in ("one", "two")]
        assert read[0] == read[1]
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == names
    again = LatentWriter(tmp_path / "two", _spec(prepared))
    assert again.done
    assert again.missing() == []


def test_ids_are_read_by_step_with_their_mask(prepared, tmp_path):
    _write(tmp_path, prepared).finish()
    ids = pickle.loads(pickle.dumps(LatentIds(tmp_path, prepared)))
    found, mask = ids.read(101)
    assert mask.tolist() == [True] * 4 + [False]
    assert found[1].tolist() == [8, 9, 10, 11]
    assert found[4].tolist() == [0, 0, 0, 0]


def test_other_data_or_another_tokenizer_are_refused_by_name(prepared, tmp_path):
    with pytest.raises(DataError, match=r"no finished latent ids; run launch\.extract"):
        LatentIds(tmp_path, prepared)
    _write(tmp_path, prepared).finish()
    with pytest.raises(DataError, match="latent ids with another tokenizer; choose another"):
        LatentWriter(tmp_path, _spec(prepared, tokenizer="t2"))
    other = tmp_path / "other"
    spec = _spec(prepared, data="x")
    writer = LatentWriter(other, spec)
    for part in spec.parts:
        writer.write(part, _ids(part))
    writer.finish()
    with pytest.raises(DataError, match="latent ids of other data; extract again"):
        LatentIds(other, prepared)
    (tmp_path / "ids.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="expected 4200 bytes"):
        LatentIds(tmp_path, prepared)


def test_what_is_no_id_is_not_written(prepared, tmp_path):
    writer = LatentWriter(tmp_path, _spec(prepared))
    part = writer.missing()[0]
    for wrong in (_ids(part)[:-1], _ids(part) + 1, _ids(part) - 1):
        with pytest.raises(ValueError, match="expected .50, 5, 4. and ids below 16"):
            writer.write(part, wrong)
    with pytest.raises(ValueError, match="int8 holds up to 127"):
        _spec(prepared, vocabulary=200)


@pytest.mark.parametrize("held", [False, True])
def test_the_pipeline_gives_each_sample_the_ids_of_its_step(prepared, tmp_path, held):
    _write(tmp_path, prepared).finish()
    ids = LatentIds(tmp_path, prepared)
    chosen = hold_out(prepared, 0.3)[1] if held else prepared
    config = StreamConfig(16, 160, image_size=16, augment=None)
    phases = [Phase(0.0, {"shapes": 1.0})]
    stream = Stream({"shapes": chosen}, phases, config, latents={"shapes": ids})
    plain = Stream({"shapes": chosen}, phases, config)
    batch, without = next(stream), next(plain)
    np.testing.assert_array_equal(batch["images"], without["images"])
    assert "latent_ids" not in without
    pictures = {
        chosen.row_of(n, s): chosen.episode(n).views["head"][s]
        for n in range(len(chosen)) for s in range(7)
    }  # fmt: skip
    for image, found, mask in zip(
        batch["images"][:, 0], batch["latent_ids"], batch["latent_mask"], strict=True
    ):
        rows = [row for row, picture in pictures.items() if (picture == image).all()]
        assert len(rows) == 1
        wanted, there = ids.read(rows[0])
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(mask, there)
    with pytest.raises(DataError, match="changed latent ids of 'shapes'"):
        Stream({"shapes": chosen}, phases, config, state=stream.state())
