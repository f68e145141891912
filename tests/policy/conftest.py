"""A policy of two steps at debug size, and one of random parameters on one device."""

import pathlib

import jax
import numpy as np
import pytest

from benchmarks import reach_ids
from configs import policy_gear
from gear_jax.data.windows import make_chunks
from gear_jax.evals.episodes import Query
from gear_jax.policy.policy import GearPolicy, open_policy
from gear_jax.train import gear, sharding
from gear_jax.train.gear_data import open_data
from gear_jax.types import Observation


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """Of the run: the procedural robot, two layers of language, no geometry."""
    folder = tmp_path_factory.mktemp("reach")
    config = policy_gear.get_config("debug,wo_vggt")
    config.model.language.depth = 2
    config.init.update(run=None, fresh=(".*",))
    config.monitor.every = 0
    config.optim.update(num_steps=2, warmup_steps=0)
    config.loop.update(checkpoint_every=2)
    config.data.augment = None
    config.data.update(random_side=False, hold_out=0.0)
    fields = config.data.sets.reach
    fields.drawing.num_episodes = 12
    fields.work, fields.latents = str(folder / "work"), str(folder / "ids")
    config.data.fast.path = str(folder / "fast")
    reach_ids.write(fields.to_dict(), fields.latents, config.model.transitions)
    return config


@pytest.fixture(scope="session")
def run(config, tmp_path_factory):
    """Its workdir."""
    from launch.train import train

    workdir = tmp_path_factory.mktemp("run")
    train(config.copy_and_resolve_references(), pathlib.Path(workdir))
    return workdir


@pytest.fixture(scope="session")
def opened(run):
    """The run's policy, on all devices."""
    return open_policy(run, device_batch=1)


@pytest.fixture(scope="session")
def data(config):
    """What the run was trained on."""
    return open_data(config, gear.sequence_config(config.model))


@pytest.fixture(scope="session")
def make_policy(config, data):
    """(devices, rows of each, axes) -> a policy of random parameters.

    None of them is zero: that would hide what it gates.
    """
    model = gear.make_model(config)
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        scale = 1.0 if "scale" in name or "norm" in name else 0.0
        spread = 0.05 if x.ndim < 2 else 0.7 / np.sqrt(x.shape[-2])
        return (scale + spread * rng.standard_normal(x.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    head = params["language"]["head" if "head" in params["language"] else "embed"]
    head[256:] *= 0.1  # it speaks in letters

    params = jax.tree.map(jax.numpy.asarray, params)

    def make(devices, device_batch, **sizes):
        mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        return GearPolicy(
            model.cfg,
            placed,
            data.normalizer,
            data.rows.tokenizer,
            model.sequence_for_prompts(),
            image_size=config.model.image_size,
            fit=config.data.fit,
            mesh=mesh,
            identity={"name": "random"},
            device_batch=device_batch,
        )

    return make


@pytest.fixture(scope="session")
def policy(make_policy):
    """On one device."""
    return make_policy(1, 4)


@pytest.fixture(scope="session")
def observations(data):
    """{(episode, step): what the robot sees and feels there}."""
    prepared, made = data.train["reach"], {}
    for number in range(len(prepared)):
        episode = prepared.episode(number)
        for step in range(episode.num_steps):
            state = make_chunks([episode], [step], data.normalizer.spec)[2]
            made[number, step] = Observation(
                {view: np.asarray(images[step]) for view, images in episode.views.items()},
                episode.instruction,
                episode.embodiment,
                {key: value[0] for key, value in state.items()},
            )
    return made


@pytest.fixture(scope="session")
def query(observations):
    """(episode, step) -> the query that a robot asks there, as the step-th."""

    def make(number, step):
        return Query(observations[number, step], "reach", "reach", number, step)

    return make
