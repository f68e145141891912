"""Flow matching: the one statement of the tau convention, 0 = noise and 1 = data.

    action, noise, tau -> noised chunk, target velocity -> loss            (training)
    noise -> Euler steps from tau = 0 to 1 -> action                       (sampling)

GEAR-VLA eq. 2: A_tau = tau A + (1 - tau) noise, whose velocity is A - noise. openpi counts the
other way (its t = 1 is noise): turn signs when copying. All of it is float32, whatever the towers
are. Source: systems.md 2.6, ported_models.md E.
"""

import jax
import jax.numpy as jnp

TAU_MAX = 0.999  # of training: the exact end of the path teaches nothing


def sample_tau(rng, shape):
    """Flow times of training, more of them near noise: 0.999 (1 - u), u ~ Beta(1.5, 1).

    The paper gives no law; this is pi0's, counted from noise to data. The distribution function of
    Beta(1.5, 1) is u^1.5, so u is U^(2/3) for a uniform U.

    Args:
        rng: key.
        shape: one tau for each chunk, mostly (B,).

    Returns:
        float32[*shape], 0 .. 0.999.
    """
    u = jax.random.uniform(rng, shape, jnp.float32) ** (2 / 3)
    return TAU_MAX * (1 - u)


def noised(action, noise, tau):
    """Chunks on the straight way from noise to data (GEAR-VLA eq. 2).

    Args:
        action: float[..., A, a], normalised.
        noise: float[..., A, a], standard normal.
        tau: float32[...], 0 gives the noise, 1 the action.

    Returns:
        float32[..., A, a].
    """
    tau = tau.astype(jnp.float32)[..., None, None]
    return tau * action.astype(jnp.float32) + (1 - tau) * noise.astype(jnp.float32)


def target(action, noise):
    """Velocity float32[..., A, a] of that way, the same at every tau (GEAR-VLA eq. 2)."""
    return action.astype(jnp.float32) - noise.astype(jnp.float32)


def flow_loss(velocity, target, mask):
    """Mean squared error over the valid entries of the whole batch (GEAR-VLA eq. 2).

    Args:
        velocity: float[B, A, a], the action expert's.
        target: float32[B, A, a], of `target`.
        mask: bool[B, A, a], `action_mask`: steps of the episode, arms and dimensions on record.

    Returns:
        float32[]; 0, without gradient, when nothing is valid. What the mask hides has no influence,
        not even a NaN.
    """
    error = velocity.astype(jnp.float32) - target.astype(jnp.float32)
    total = jnp.sum(jnp.square(jnp.where(mask, error, 0.0)))
    return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def integrate(velocity_fn, noise, num_steps):
    """Follow the velocity from noise to data by Euler steps (systems.md 2.6: 10 of them).

    Args:
        velocity_fn: (chunk float32[..., A, a], tau float32[...]) -> velocity [..., A, a]; called at
            tau = 0, 1 / num_steps, ..., 1 - 1 / num_steps.
        noise: float[..., A, a], standard normal.
        num_steps: equal steps.

    Returns:
        float32[..., A, a].

    Raises:
        ValueError: fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: expected at least 1")

    def step(index, chunk):
        tau = jnp.full(noise.shape[:-2], index / num_steps, jnp.float32)
        return chunk + velocity_fn(chunk, tau).astype(jnp.float32) / num_steps

    return jax.lax.fori_loop(0, num_steps, step, noise.astype(jnp.float32))
