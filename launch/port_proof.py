"""From nothing to a proved port, in about a minute on a laptop.

    make port-proof

Makes random Qwen2.5-VL and VGGT checkpoints in the published format, ports them both ways, joins
them into GEAR-VLA's visual pathway and prints what it proved; the last line is one JSON object.
Sizes: configs/port_proof.py. Everything it writes lies under runs/port_proof.
"""

import os

if __name__ == "__main__":  # before jax starts: eight simulated devices for the sharding proof
    flags = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import dataclasses
import json
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from configs import port_proof
from gear_jax.losses import next_token_loss
from gear_jax.porting import files, models, table
from gear_jax.systems import vlm
from gear_jax.train import sharding
from launch import port

RUN = pathlib.Path("runs/port_proof")


def main():
    """Run every proof; returns 1 if one fails."""
    config, start = port_proof.get_config(), time.perf_counter()
    shutil.rmtree(RUN, ignore_errors=True)
    proofs = {}

    def say(name, value, holds):
        proofs[name] = value
        print(f"{'proved' if holds else 'FAILED':>7}  {name}: {value}", flush=True)
        return holds

    fine = []
    for name in models.MODELS:
        tensors, identical = round_trip(name, config)
        fine.append(say(f"{name}: HF -> Orbax -> HF, byte-identical tensors", tensors, identical))
    params, cfg = join(config)
    batch = make_batch(config, cfg)
    for name, value, holds in prove(params, cfg, batch, config):
        fine.append(say(name, value, holds))
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"ok": all(fine), "seconds": seconds, "proofs": proofs}))
    return 0 if all(fine) else 1


def round_trip(name, config):
    """Make a random checkpoint, convert it, export it; (number of tensors, all equal)."""
    source, ours, back = (RUN / step / name for step in ("hf", "ours", "back"))
    write_random(name, config[name].to_dict(), source, config.seed)
    arguments = ["convert", "--model", name, "--source", str(source), "--target", str(ours)]
    if port.main(arguments) or port.main(["export", "--source", str(ours), "--target", str(back)]):
        return 0, False
    one, other = files.open_directory(source), files.open_directory(back)
    equal = one.keys() == other.keys() and all(
        tensor.read().tobytes() == other[key].read().tobytes() for key, tensor in one.items()
    )
    return len(one), equal


def write_random(name, config, folder, seed):
    """A checkpoint as published: config.json and model.safetensors, bfloat16."""
    rng = np.random.default_rng(seed)

    def random(entry):
        values = 0.1 * rng.standard_normal(entry.shape)
        is_scale = len(entry.shape) == 1 and not entry.key.endswith("bias")
        return (values + is_scale).astype(ml_dtypes.bfloat16)

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    entries = models.describe(name, config).entries
    tensors = [(e.key, "BF16", e.shape, lambda e=e: random(e)) for e in entries]
    files.write_file(folder / "model.safetensors", tensors)


def join(config):
    """Both ported models as one parameter tree with a zero 3D block between them; its config."""
    opened = {}
    for name in models.MODELS:
        model, _, tensors = models.open_source(name, RUN / "back" / name)
        pairs = table.match(model.table, model.parameters, tensors)
        mesh = sharding.make_mesh({}, jax.devices("cpu")[:1])
        shardings = table.flatten(sharding.param_shardings(table.unflatten(model.targets), mesh))
        arrays = table.load(pairs, model.targets, model.table.sizes, shardings, jnp.float32)
        opened[name] = model.cfg, table.unflatten(arrays)
    (qwen, params), (vggt, geometry) = opened["qwen2_5_vl"], opened["vggt"]
    projector = dataclasses.replace(qwen.projector, geometry_width=2 * vggt.width)
    cfg = dataclasses.replace(qwen, projector=projector, geometry=vggt)
    shape = jax.eval_shape(lambda: vlm.init(cfg, jax.random.key(0)))["projector"]["geometry_kernel"]
    block = jnp.zeros(shape.shape)
    projector = params["projector"] | {"geometry_kernel": block}
    return params | {"projector": projector, "geometry": geometry["geometry"]}, cfg


def make_batch(config, cfg):
    """Four samples: three views, of which one is absent in half of them, and some text."""
    rng, side = np.random.default_rng(config.seed), config.image_size
    merged = cfg.vision.patch_size * cfg.vision.spatial_merge
    visual, text = config.num_views * (side // merged) ** 2, 8
    tokens = rng.integers(0, 400, (4, visual + text), dtype=np.int32)
    index = np.full(tokens.shape, -1, np.int32)
    index[:, :visual] = np.arange(visual)
    positions = np.broadcast_to(np.arange(visual + text, dtype=np.int32), (3, *tokens.shape))
    scenes = np.zeros((4, config.num_views), np.int32)
    scenes[::2, 1] = -1  # an absent view
    images = rng.integers(0, 256, (4, config.num_views, side, side, 3), dtype=np.uint8)
    batch = {"tokens": tokens, "positions": positions, "segments": np.ones_like(tokens)}
    batch |= {"insert_index": index, "images": images, "scenes": scenes}
    return jax.tree.map(jnp.asarray, batch)


def prove(params, cfg, batch, config):
    """Yield (claim, printed value, whether it holds)."""

    def logits(params, batch, cfg=cfg):
        inserts = vlm.view_embeddings(params, cfg, batch["images"], batch["scenes"])
        return vlm.logits(params, vlm.forward(params, cfg, batch, inserts)[0])

    run = jax.jit(logits)
    with_branch = run(params, batch)
    flat = dataclasses.replace(cfg, geometry=None)
    without = jax.jit(lambda params, batch: logits(params, batch, flat))(params, batch)
    difference = float(jnp.max(jnp.abs(with_branch - without)))
    yield (
        "logits with and without the 3D branch at the start, largest difference",
        difference,
        (difference == 0),
    )

    @jax.jit
    def gradients(params, batch):
        return jax.grad(lambda p: next_token_loss(logits(p, batch), batch["tokens"]))(params)

    def largest(tree):
        return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))

    first = gradients(params, batch)
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, first)
    second = gradients(stepped, batch)
    now, then = largest(first["geometry"]), largest(second["geometry"])
    claim = "largest VGGT gradient at step 0 and at step 1"
    yield claim, [now, float(f"{then:.3g}")], now == 0 < then

    mesh = sharding.make_mesh(config.mesh, jax.devices("cpu"))
    placed = jax.device_put(stepped, sharding.param_shardings(stepped, mesh))
    rows = sharding.batch_sharding(mesh)
    split = {key: x if key == "positions" else jax.device_put(x, rows) for key, x in batch.items()}
    split["positions"] = jax.device_put(
        batch["positions"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    error = float(
        jnp.max(jnp.abs(np.asarray(run(placed, split)) - np.asarray(run(stepped, batch))))
    )
    claim = f"logits on a mesh {dict(config.mesh)} against one device, largest difference"
    yield claim, float(f"{error:.2g}"), error < 1e-5

    inserts = jax.jit(lambda p, b: vlm.view_embeddings(p, cfg, b["images"], b["scenes"]))
    inserts = inserts(stepped, batch)
    generate = jax.jit(lambda p, b, i: vlm.generate(p, cfg, b, i, max_new_tokens=config.new_tokens))
    tokens, _ = generate(stepped, batch, inserts)
    chosen = teacher_forced(stepped, cfg, batch, inserts, tokens)
    claim = f"{config.new_tokens} greedy tokens with the K/V cache equal the whole sequence's"
    yield claim, bool(jnp.array_equal(tokens, chosen)), bool(jnp.array_equal(tokens, chosen))


def teacher_forced(params, cfg, batch, inserts, tokens):
    """What the whole sequence, without a cache, would have chosen at each generated place."""
    start, new = batch["tokens"].shape[1], tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(start + new), (3, len(tokens), start + new))
    whole = {
        "tokens": jnp.concatenate([batch["tokens"], tokens], axis=1),
        "positions": positions,
        "segments": jnp.ones((len(tokens), start + new), jnp.int32),
        "insert_index": jnp.pad(batch["insert_index"], ((0, 0), (0, new)), constant_values=-1),
    }
    run = jax.jit(lambda p, b, i: vlm.logits(p, vlm.forward(p, cfg, b, i)[0]))
    return jnp.argmax(run(params, whole, inserts)[:, start - 1 : -1], axis=-1)


if __name__ == "__main__":
    raise SystemExit(main())
