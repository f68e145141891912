"""The quickstart's plan and its way through it; the steps themselves have their own tests."""

import importlib
import json
import pathlib
import re

import jax
import pytest

from configs import quickstart as configs
from gear_jax.tokenizers.small import small_tokenizer
from gear_jax.train.gear import make_model
from gear_jax.train.start import loader
from launch import quickstart


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "_report", lambda one, seconds: len(seconds))
    monkeypatch.delenv("FROM_SCRATCH", raising=False)
    return tmp_path


@pytest.mark.parametrize("world", quickstart.QUICKSTARTS)
def test_killed_it_goes_on_with_the_step_that_is_not_done(world, run, monkeypatch, capsys):
    ran, dies = [], ["pretrain"]

    def step(log, command, where, console):
        ran.append(log.stem)
        return 1 if log.stem in dies else 0

    monkeypatch.setattr(quickstart, "_run", step)
    assert quickstart.main([world]) == 1
    assert "error: pretrain ended with 1" in capsys.readouterr().err
    first, dies[:] = list(ran), []
    ran.clear()
    one = quickstart.QUICKSTARTS[world]
    steps = list(quickstart.plan(one, from_scratch=False))
    assert quickstart.main([world]) == len(steps)
    assert first[:-1] + ran == steps
    assert list(json.loads((run / one.world.root / "steps.json").read_text())) == steps


@pytest.mark.parametrize("world", quickstart.QUICKSTARTS)
def test_every_stage_of_a_world_has_a_config_that_can_be_built(world):
    one = quickstart.QUICKSTARTS[world]
    loaded = importlib.import_module(one.world.config.removesuffix(".py").replace("/", "."))
    stages = [name for name in quickstart.plan(one, from_scratch=True) if name in configs.STAGES]
    assert stages == [name for name in configs.STAGES if name in stages]
    for stage in stages:
        config = loaded.get_config(stage)
        assert {fields.path for fields in config.data.sets.values()} <= {one.world.path}
        if stage != "latents":
            jax.eval_shape(make_model(config).init, jax.random.key(0))


def test_a_trained_policy_is_always_asked_with_the_same_temperature():
    for one in quickstart.QUICKSTARTS.values():
        steps = quickstart.plan(one, from_scratch=False)
        asked = [steps[name] for name in steps if name.startswith("evaluate")]
        trained = [step for step in asked if not any("replay:" in word for word in step)]
        assert len(trained) == len(asked) - 1 > 1
        for step in trained:
            assert step[step.index("--temperature") + 1] == str(one.temperature)


@pytest.mark.parametrize(
    ("world", "more"),
    [
        ("tabletop", {*configs.QUESTION_STAGES, "spatial", "publish"}),
        ("libero", {"spatial", "publish"}),
    ],
)
def test_from_scratch_trains_the_vlm_and_begins_with_it(world, more):
    one = quickstart.QUICKSTARTS[world]
    short, whole = (quickstart.plan(one, from_scratch=flag) for flag in (False, True))
    assert set(whole) - set(short) == more
    assert f"--config.init.published={one.world.vlm}" in short["pretrain"]
    target = whole["publish"][whole["publish"].index("--target") + 1]
    assert f"--config.init.published={target}" in whole["pretrain"]
    assert f"--config.data.fast.path={target}/fast" in whole["pretrain"]


def test_a_vlm_from_nothing_begins_where_the_stage_before_ended():
    stages = (*configs.QUESTION_STAGES, "spatial")
    begun = [configs.get_config(stage).init.run for stage in stages]
    assert begun == [None, *(f"{configs.TABLETOP.root}/{stage}" for stage in stages[:-1])]


def test_a_stage_may_begin_with_new_layers_where_it_has_more_than_the_one_before():
    """Said where there are none, a checkpoint with too few layers would be taken in silence."""
    configured = [configs.get_config(stage) for stage in (*configs.QUESTION_STAGES, "spatial")]
    depths = [config.model.language.depth for config in configured]
    grown = [False, *(one < other for one, other in zip(depths, depths[1:], strict=False))]
    assert [config.init.deeper for config in configured] == grown
    assert sum(grown) == 1


def test_names_and_ways_are_learned_of_few_blocks_first():
    asked = [
        {name for name, pool in configs.get_config(stage).data.pools.items() if pool.weight}
        for stage in configs.QUESTION_STAGES
    ]
    assert asked == [
        {"single"},
        {"pairs"},
        {"points", "scenes", "names"},
        {"single_ways", "scenes", "names"},
        {"ways", "offsets", "points", "scenes"},
    ]


@pytest.mark.parametrize("variant", ["full", "wo_latent", "wo_fast", "lapa", "wo_vggt"])
def test_every_variant_begins_with_the_vlm_that_ships(variant):
    config = configs.get_config(f"pretrain,{variant}")
    params, _ = jax.eval_shape(make_model(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), params)
    begun = loader(config.init, 10**6, lambda line: None)(params)
    towers = {"vision", "geometry", "projector", "language", "state"}
    for tower in towers - ({"geometry"} if variant == "wo_vggt" else set()):
        assert any(bool(leaf.any()) for leaf in jax.tree.leaves(begun[tower])), tower
    assert (variant == "wo_vggt") == ("geometry" not in begun)


def test_the_vlms_that_ship_are_small():
    folders = [pathlib.Path(one.world.vlm) for one in quickstart.QUICKSTARTS.values()]
    sizes = [
        [path.stat().st_size for path in folder.rglob("*") if path.is_file()] for folder in folders
    ]
    assert all(sizes)
    assert sum(map(sum, sizes)) < 4 << 20


@pytest.mark.parametrize("world", [configs.TABLETOP, configs.LIBERO])
def test_no_stage_learns_from_a_recording_that_another_holds_out(world):
    """A recording's name alone decides, so the share has to be the same."""
    stages = ("spatial", "latents", "pretrain", "policy")
    shares = {configs.get_config(stage, world).data.hold_out for stage in stages}
    assert len(shares) == 1
    assert min(shares) > 0


@pytest.mark.parametrize("arg", ["", "walk", "policy,vlm2"])
def test_a_stage_that_is_none_is_refused(arg):
    with pytest.raises(ValueError, match=r"configs/quickstart.py"):
        configs.get_config(arg)


def test_learned_latents_that_stay_as_they_are_need_no_loss_of_their_own():
    """In "policy" only the expert learns: what "pretrain" taught the latents is kept."""
    make_model(configs.get_config("policy,wo_latent"))
    config = configs.get_config("policy,wo_latent")
    config.optim.partitions = (("vision/.*", None), (".*", "vlm"))
    with pytest.raises(ValueError, match="nothing trains the learned latents"):
        make_model(config)


def test_every_slow_pattern_names_a_parameter():
    config = configs.get_config("pretrain")
    params, _ = jax.eval_shape(make_model(config).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    [(pattern, _)] = config.optim.lr_scale
    slow = {"/".join(name.split("/")[:2]) for name in names if re.fullmatch(pattern, name)}
    assert {"language/layers", "language/final_norm"} <= slow
    assert "language/embed" not in slow


def test_latents_begin_as_the_token_that_opens_every_place():
    config, tokenizer = configs.get_config("spatial"), small_tokenizer()
    row, first, end = config.init.rows_like
    for said in ("at [+03 -12 +00]", "red block [+03 -12 +00]", "red block [24, 47]"):
        ids = tokenizer.encode(said)
        assert ids[ids.index(row) + 1] in tokenizer.encode("+2")
    codes, opening = tokenizer.id("<la_0>"), tokenizer.id("<|la_start|>")
    assert (first, end) == (codes, opening + 1)
    fast = tokenizer.id("<fast_0000>")
    assert config.init.fresh_rows == (fast, codes)  # no mark of states and views among them


@pytest.mark.parametrize("stage", configs.QUESTION_STAGES)
def test_a_world_without_questions_has_no_stage_of_questions(stage):
    with pytest.raises(ValueError, match=f"quickstart_libero.py: stage '{stage}' learns from que"):
        configs.get_config(stage, configs.LIBERO)
