"""A step of our policy stage beside a step of openpi's Pi0 of the same widths, on the CPU.

    git clone --depth 1 https://github.com/Physical-Intelligence/openpi
    pip install jaxtyping==0.2.36 beartype==0.19.0 augmax torch transformers
    python -m benchmarks.train_step_vs_openpi --openpi openpi

openpi pins older packages; its model files run on ours, but for jaxtyping and beartype: use an
environment of its own. Ours is the 100m of train_step.py, twice: without remat, as it is there, and
with openpi's, which keeps a layer's input alone. Forward, backward, clip and AdamW, each side's
own; one thread on one pinned core, by turns A B C, C B A, in CPU time, for the machine may be busy.
"""

import os

if __name__ == "__main__":  # before any library starts its threads
    os.environ |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")
    ).strip()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import argparse
import importlib
import json
import pathlib
import re
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import train_step
from gear_jax.train import gear, gear_data
from gear_jax.train.gear_batch import arrays
from gear_jax.train.optim import make_tx
from gear_jax.train.state import make_train_step, new_state
from gear_jax.types import VIEWS

_MODULES = ("models.gemma", "models.model", "models.pi0_config", "models.siglip",
            "training.optimizer")  # fmt: skip
_VIT = {"depth": 12, "width": 192, "num_heads": 6, "mlp_dim": 768}  # our geometry tower's blocks
_SAID = """\
both: batch of {batch}, float32, {views} views of {image} px in patches of 14, rows of {length} positions
    language tower: {depth} layers of {width}, {num_heads} heads on {num_kv_heads} of {head_dim}, MLP of {mlp_dim}, vocabulary {vocab_size}
    expert: {depth} layers of {expert.width}, the same heads, MLP of {expert.mlp_dim}, chunks of {chunk} x 20
    12 trained ViT layers: our 3D branch, and in the place of openpi's SigLIP So400m
ours alone: 4 frozen ViT layers; patches merged 2 x 2 before the language tower (openpi: its row is
    patches, then prompt); cross-entropy, and no flow gradient into the language tower; tau in every
    layer of the expert; a clip for each partition; the guard against steps that are not finite
openpi alone: the state as one more token of the expert; decay of 1e-10. Augmentation is in neither
    step: openpi has it there, and it is off"""  # noqa: E501


def main():
    """Print what is matched, a line for each side, the ratios, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--openpi", help="folder of a checkout of openpi")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7, help="of a step each, 2 or more")
    parser.set_defaults(size="100m", workers=0, steps=1)  # of train_step.small_config
    args = parser.parse_args()
    openpi = _import_openpi(args.openpi)
    with tempfile.TemporaryDirectory() as folder:
        config = train_step.small_config(args, pathlib.Path(folder))
        sides = _ours(config)
    print(_SAID.format(
        batch=args.batch, views=len(VIEWS), image=config.model.image_size,
        length=config.model.length, chunk=config.data.chunk_len, expert=config.model.expert,
        **config.model.language,
    ))  # fmt: skip
    sides["openpi, remat full"] = _pi0(openpi, config)
    for call, _ in sides.values():  # compile
        call()
    times = {name: [] for name in sides}
    for turn in range(args.turns):
        for name in list(sides) if turn % 2 == 0 else reversed(sides):
            cpu, wall = time.process_time(), time.perf_counter()
            sides[name][0]()
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        print(f"turn {turn}: " + ", ".join(f"{t[-1][0]:.2f} s" for t in times.values()), flush=True)
    made, theirs = {}, times["openpi, remat full"]
    for name, spent in times.items():
        cpu, wall = (statistics.median(x) for x in zip(*spent, strict=True))
        ratios = [a[0] / b[0] for a, b in zip(spent, theirs, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        speed = args.batch * sides[name][1] / cpu / 1e9
        made[name] = {"cpu": cpu, "wall": wall, "gflops": speed, "ratio": [low, ratio, high]}
        print(
            f"{name:<18}: CPU {cpu:.2f} s a step, {cpu / args.batch:.2f} s a sample, wall "
            f"{wall:.2f} s a step, {speed:.1f} GFLOP/s; CPU / openpi's {ratio:.2f}, quartiles "
            f"{low:.2f} .. {high:.2f}"
        )
    print(json.dumps({"jax": jax.__version__, "load": os.getloadavg(), "made": made}))


def _work(side, params, rules):
    """FLOPs of a sample: a matrix of N weights costs 6 N a token, 2 N without a backward pass.

    Padding counts. What remat does again does not; nor do embeddings, norms and the products of
    queries and keys.

    Args:
        side: its name.
        params: its parameters.
        rules: (regex, FLOPs a weight, tokens of a sample); the first that matches counts.
    """
    sizes = dict.fromkeys([regex for regex, *_ in rules], 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        if matched := next((one for one in sizes if re.fullmatch(one, name)), None):
            sizes[matched] += leaf.size
    work = sum(sizes[regex] * factor * tokens for regex, factor, tokens in rules)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{side}: {total / 1e6:.1f}M parameters, {work / 1e9:.1f} GFLOP a sample, namely")
    for regex, factor, tokens in rules:
        print(f"    {factor} x {sizes[regex] / 1e6:5.2f}M x {tokens:3} tokens  {regex}", flush=True)
    return work


def _ours(config):
    """{side: (call of one step, FLOPs of a sample)}; both work on one state."""
    model = gear.make_model(config)
    stream = gear_data.open_data(config, model.sequence).open_train(config, None)
    batch = jax.device_put(arrays(next(stream)))
    stream.close()
    tx = make_tx(jax.eval_shape(model.init, jax.random.key(0))[0], model.optim)
    held = [jax.jit(lambda: new_state(model.init, tx, 0, ema=False))()]

    def side(remat):
        config.model.remat = remat
        step = jax.jit(make_train_step(gear.make_model(config).loss, tx), donate_argnums=0)

        def call():
            held[0], _ = jax.block_until_ready(step(held[0], batch))

        return call

    patches, length, vlm = _patches(config), config.model.length, model.cfg.vlm
    work = _work("ours", held[0].params, (
        (r"vision/.*(kernel|patch_embed)", 2, patches),
        (r"geometry/.*kernel", 6, patches + len(VIEWS) * vlm.geometry.num_special),
        (r"projector/.*kernel", 6, patches // vlm.vision.spatial_merge**2),
        (r"language/layers/.*kernel", 6, length),
        (r"language/head", 6, length - 1),
        (r"expert/.*(modulation|time_in|time_out)/kernel", 6, 1),
        (r"expert/.*kernel", 6, config.data.chunk_len),
    ))  # fmt: skip
    real = np.mean(np.sum(np.asarray(batch["segments"]) > 0, axis=1))
    print(f"    {real:.0f} of the {length} positions are tokens, the others padding")
    return {f"ours, remat {remat}": (side(remat), work) for remat in ("none", "full")}


def _patches(config):
    return len(VIEWS) * (config.model.image_size // 14) ** 2


def _import_openpi(folder):
    """The modules of `_MODULES` by their last name.

    Raises:
        SystemExit: no checkout, or something that it needs is not installed.
    """
    source = pathlib.Path(folder or "", "src").resolve()
    if folder is None or not (source / "openpi").is_dir():
        raise SystemExit(
            f"--openpi is {folder!r}: expected a checkout of openpi, see this file's first lines"
        )
    sys.path.insert(0, str(source))
    try:
        return {one.split(".")[1]: importlib.import_module(f"openpi.{one}") for one in _MODULES}
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"openpi: {error}; see this file's first lines") from error


def _pi0(openpi, config):
    """Call of one step of Pi0 in our sizes, and FLOPs of a sample."""
    gemma, language, image = openpi["gemma"], config.model.language, (config.model.image_size,) * 2
    shared = {key: language[key] for key in ("depth", "num_heads", "num_kv_heads", "head_dim")}
    # openpi names its sizes, and has no small ones: put ours in their place
    gemma.get_config = lambda name: gemma.Config(
        width=config.model[name].width, mlp_dim=config.model[name].mlp_dim, **shared
    )
    gemma.PALIGEMMA_VOCAB_SIZE = language.vocab_size
    openpi["siglip"].decode_variant = lambda name: _VIT | {"patch_size": (14, 14)}
    openpi["model"].IMAGE_RESOLUTION = image
    openpi["model"].preprocess_observation.__kwdefaults__["image_resolution"] = image
    patches, length, chunk = _patches(config), config.model.length, config.data.chunk_len
    pi0 = openpi["pi0_config"].Pi0Config(
        dtype="float32", paligemma_variant="language", action_expert_variant="expert",
        action_dim=20, action_horizon=chunk, max_token_len=length - patches,
    )  # fmt: skip
    graph = nnx.graphdef(nnx.eval_shape(pi0.create, jax.random.key(0)))
    adamw, schedule = openpi["optimizer"].AdamW(), openpi["optimizer"].CosineDecaySchedule()
    tx = openpi["optimizer"].create_optimizer(adamw, schedule)
    params = jax.jit(lambda rng: nnx.state(pi0.create(rng)))(jax.random.key(0))
    rows = pi0.fake_obs(config.data.batch_size), pi0.fake_act(config.data.batch_size)

    def loss(params, rows, rng):
        return jnp.mean(nnx.merge(graph, params).compute_loss(rng, *rows, train=False))

    def step(state, rows):  # as in openpi's scripts/train.py
        params, opt_state, number = state
        rng = jax.random.fold_in(jax.random.key(1), number)
        value, grads = jax.value_and_grad(loss)(params, rows, rng)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state, number + 1), (value, optax.tree.norm(grads))

    program = jax.jit(step, donate_argnums=0)
    held = [(params, jax.jit(tx.init)(params), jnp.zeros((), jnp.int32))]

    def call():
        held[0], _ = jax.block_until_ready(program(held[0], rows))

    return call, _work("openpi", params, (
        (r"PaliGemma/img/.*kernel", 6, patches),
        (r"PaliGemma/llm/layers/.*_1/(w|gating_einsum|linear)", 6, chunk + 1),
        (r"PaliGemma/llm/layers/.*/(w|gating_einsum|linear)", 6, length),
        (r"(action|state)_.*kernel", 6, chunk),
    ))  # fmt: skip


if __name__ == "__main__":
    main()
