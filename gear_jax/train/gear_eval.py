"""Held-out validation of a GEAR-VLA run: losses by kind, and the flow loss both ways.

The expert is trained on the latent tokens that the future gives, and runs on those that the VLM
says. `flow` conditions on the former, `flow_predicted` on the latter; their ratio is the metric to
watch (systems.md 2.6).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gear_jax.data.sequences import token_rows
from gear_jax.systems import gear
from gear_jax.train import lora, sharding
from gear_jax.train.gear_batch import arrays, nested
from gear_jax.types import ARM_DIM, ARM_PARTS

_PROMPT = "prompt"


class HeldOut:
    """Measures held-out examples, always the same."""

    def __init__(self, cfg, config, data, mesh, adapters=None):
        """Keep what is needed.

        Args:
            cfg: GearConfig.
            config: of the run; `monitor.batches` of its batch size are measured.
            data: GearData.
            mesh: of the run.
            adapters: LoraConfig, or None.

        Raises:
            ValueError: nothing is held out.
        """
        if not data.held:
            raise ValueError("monitor.every is set and nothing is held out: set data.hold_out")
        self.cfg, self.config, self.data, self.mesh = cfg, config, data, mesh
        self._measure = jax.jit(
            lambda params, **given: measure(lora.merge(params, adapters), cfg=cfg, **given)
        )

    def run(self, state):
        """{name: mean}, over `monitor.batches` batches, of the averaged parameters if there are."""
        params = state.params if state.ema is None else state.ema
        stream, sums = self.data.open_held(self.config), None
        rows = sharding.batch_sharding(self.mesh)
        try:
            for number in range(self.config.monitor.batches):
                batch = {
                    key: jax.make_array_from_process_local_data(rows, value)
                    for key, value in self._arrays(next(stream)).items()
                }
                new = self._measure(params, batch=batch, rng=jax.random.key(number))
                sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        finally:
            stream.close()
        return {
            name: float(np.asarray(value) / max(float(np.asarray(weight)), 1e-9))
            for name, (value, weight) in sums.items()
            if float(np.asarray(weight)) > 0
        }

    def _arrays(self, batch):
        """What `gear.arrays` gives, the ids and the rows that a policy goes on from."""
        maker = self.data.rows
        prompt_only = dataclasses.replace(maker.config, prompt_only=True)
        prompts = token_rows(batch, maker.tokenizer, prompt_only, [None] * len(batch["sample"]))
        prompts["positions"] = np.moveaxis(prompts["positions"], 0, 1)
        said = {f"{_PROMPT}/{key}": value for key, value in prompts.items()}
        ids = {key: batch[key] for key in ("latent_ids", "latent_mask") if key in batch}
        return arrays(batch) | said | ids


def measure(params, *, cfg, batch, rng):
    """Sums and weights {name: (sum, weight)} of one batch.

    Args:
        params: {tower: parameters}.
        cfg: GearConfig.
        batch: of `HeldOut._arrays`.
        rng: key of noise and tau; both flow losses use the same.

    Returns:
        tokens, text, latent, fast: mean cross-entropy, weighted by labels; latent_right: share of
        latent tokens that the VLM says as the future has them; flow, flow_predicted; chunk_error:
        mean squared error of a sampled chunk, normalised units; fvu_position, fvu_rmat6d,
        fvu_gripper: the same over the mean square of what was wanted (1: no better than zeros).
    """
    sorted_keys = sorted(key for key in batch if key.startswith(f"{_PROMPT}/"))
    prompts = {key.removeprefix(f"{_PROMPT}/"): batch[key] for key in sorted_keys}
    batch = nested({key: value for key, value in batch.items() if key not in sorted_keys})
    prompts = batch | prompts | {"positions": jnp.moveaxis(prompts["positions"], 1, 0)}

    hidden, kv = gear.prefill(params, cfg, batch)
    loss, means = gear.token_loss(params, cfg, batch, hidden)
    labels, kinds = batch["labels"][:, 1:] >= 0, batch["acts"][:, 1:]
    counts = [jnp.sum(labels & (kinds == kind)) for kind in range(len(gear.LOSSES))]
    made = {name: (mean * n, n) for name, mean, n in zip(gear.LOSSES, means, counts, strict=True)}
    made["tokens"] = loss * sum(counts), sum(counts)

    prompt_hidden, prompt_kv = gear.prefill(params, cfg, prompts)
    if cfg.latents == "codes":
        ids, prompt_kv, grown = gear.say_latents(params, cfg, prompts, prompt_hidden, prompt_kv)
        prompts |= grown
        if "latent_ids" in batch:
            wanted, there = batch["latent_ids"].reshape(ids.shape), batch["latent_mask"]
            there = jnp.repeat(there, ids.shape[1] // there.shape[1], 1)
            made["latent_right"] = jnp.sum((ids == wanted) & there), jnp.sum(there)
    if cfg.expert is None:
        return _as_float(made)

    cached = gear.latent_cache(cfg, kv, batch)
    predicted = gear.latent_cache(cfg, prompt_kv, prompts)
    there = cached[1].any(axis=1)[:, None, None]
    mask = batch["action_mask"] & there
    count = jnp.sum(mask)
    same = {"action": batch["action"], "action_mask": mask}
    made["flow"] = gear.flow_loss(params, cfg, batch | same, cached, rng) * count, count
    made["flow_predicted"] = (
        gear.flow_loss(params, cfg, prompts | same, predicted, rng) * count,
        count,
    )
    noise = jax.random.normal(jax.random.fold_in(rng, 1), batch["action"].shape)
    chunk = gear.sample_chunk(params, cfg, prompts, predicted, noise)
    return _as_float(made | chunk_errors(chunk, batch["action"], mask))


def chunk_errors(chunk, wanted, mask):
    """Sums and weights of a chunk's errors, where a mask bool[B, A, a] is True.

    One number hides what is small: turns of a few degrees were once not learned at all, and
    chunk_error fell all the same.

    Args:
        chunk: float32[B, A, a], sampled.
        wanted: likewise, normalised units.
        mask: what there is.
    """
    error = jnp.where(mask, jnp.square(chunk - wanted), 0)
    energy = jnp.where(mask, jnp.square(wanted), 0)
    made = {"chunk_error": (jnp.sum(error), jnp.sum(mask))}
    for part, dims in ARM_PARTS.items():
        of_part = [jnp.sum(x.reshape(-1, ARM_DIM)[:, dims]) for x in (error, energy)]
        made[f"fvu_{part}"] = (of_part[0], of_part[1])
    return made


def _as_float(made):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), made)
