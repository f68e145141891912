import json

import pytest

from gear_jax.data.record_packs import Packed, Room
from gear_jax.data.record_pool import Pool


def count(record):
    return len(json.dumps(record)) + 20


ROOM = Room(tokens=700, images=3, image_tokens=100, count=count)


@pytest.fixture
def pool(tmp_path):
    lines = [
        {"id": f"q{n}", "type": "general_vqa", "images": ["a.jpg"] * (1 + n % 3 % 2),
         "question": "What is it?" + "?" * (7 * n % 90), "answer": "A mug."}
        for n in range(40)
    ]  # fmt: skip
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Pool(path)


def test_every_record_is_in_one_pack_and_packs_hold_what_fits(pool):
    packed = Packed(pool, ROOM, seed=0)
    packs = [packed.pack(number) for number in range(len(packed))]
    assert sorted(number for pack in packs for number in pack) == list(range(40))
    assert len(packed) < 25
    for pack in packs:
        images = sum(len(pool.record(number)["images"]) for number in pack)
        tokens = sum(count(pool.record(number)) for number in pack) + 100 * images
        assert images <= 3
        assert tokens <= 700


def test_packs_are_a_function_of_the_seed(pool):
    one, again, other = (Packed(pool, ROOM, seed=seed) for seed in (0, 0, 1))
    assert one.digest == again.digest != other.digest
    assert [one.pack(n) for n in range(5)] == [again.pack(n) for n in range(5)]
    assert [one.pack(n) for n in range(5)] != [other.pack(n) for n in range(5)]


def test_a_record_that_is_too_large_has_a_pack_of_its_own(pool):
    small = Room(tokens=10, images=3, image_tokens=100, count=count)
    assert len(Packed(pool, small, seed=0)) == 40


def test_a_question_about_a_robots_views_has_a_row_of_its_own(tmp_path):
    lines = [
        {"id": f"q{n}", "type": "general_vqa", "images": ["a.jpg"], "question": "?",
         "answer": "A mug.", **({"views": ["right_wrist"]} if n % 2 else {})}
        for n in range(12)
    ]  # fmt: skip
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    packed = Packed(Pool(path), ROOM, seed=0)
    packs = [packed.pack(number) for number in range(len(packed))]
    assert [pack for pack in packs if any(n % 2 for n in pack) and len(pack) > 1] == []
    assert any(len(pack) > 1 for pack in packs)
