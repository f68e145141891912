import math

import numpy as np
import pytest

from gear_jax.data.windows import empty_state
from gear_jax.evals.episodes import Query, canonical, json_digest, noise_seed
from gear_jax.types import Observation


def query(task="lift", init=3, number=0, suite="toy"):
    seen = Observation({}, "lift", "franka", empty_state())
    return Query(seen, suite, task, init, number)


def test_noise_has_its_written_seed_on_any_machine():
    assert noise_seed(query(), 0) == 867269273
    assert noise_seed(query(), 1) == 168174961


def test_noise_differs_between_episodes_queries_and_seeds_and_not_with_what_is_seen():
    others = [query(), query(task="push"), query(init=4), query(number=1), query(suite="b")]
    assert len({noise_seed(one, seed) for one in others for seed in (0, 1)}) == 10
    same = Query(Observation({"head": np.ones((2, 2, 3), np.uint8)}, "x", "ur5", empty_state()),
                 "toy", "lift", 3, 0)  # fmt: skip
    assert noise_seed(same, 0) == noise_seed(query(), 0)


def test_equal_json_has_equal_digests_whatever_its_order():
    assert canonical({"b": [1, None], "a": "x"}) == '{"a":"x","b":[1,null]}'
    assert json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    for bad in ({"a": np.float32(1)}, {"a": math.nan}):
        with pytest.raises(ValueError, match="JSON"):
            canonical(bad)
