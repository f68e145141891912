"""Compare our towers with stored outputs of the reference, case by case.

A case is a `.npz` of inputs and outputs, as golden/README.md of the reference data describes them.
Every array in it is either a known input or compared; an array that is neither counts as a failure,
so that nothing passes unseen. All arithmetic is float32 at the highest matmul precision.
"""

import dataclasses
import json
import re
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from gear_jax.data import qwen_images as images_lib
from gear_jax.data.mrope import mrope_positions
from gear_jax.data.patch_windows import EMPTY, patch_windows
from gear_jax.data.vlm_batch import vlm_batch
from gear_jax.losses import next_token_loss
from gear_jax.porting import table as tables
from gear_jax.porting.files import CheckpointError
from gear_jax.systems import vlm
from gear_jax.towers import attention, dinov2, vggt
from gear_jax.towers.projector import Projector
from gear_jax.towers.qwen_vision import QwenVision

ATOL, RTOL = 2e-4, 1e-4
_DAMAGED = (zipfile.BadZipFile, zlib.error)
GRADIENT_RTOL = 1e-3

_QWEN_INPUTS = re.compile(
    r"image_\d+|frames(_\d+)?|pixel_values(_videos)?|(image|video)_grid_thw|second_per_grid_ts"
    r"|input_ids|attention_mask|mm_token_type_ids|labels|generated_margin"
)
_VGGT_INPUTS = re.compile(r"images_u8|rope_in|rope_pos|grid37")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One output of one case: what was compared, how far off it is, whether that is near enough."""

    case: str
    output: str
    shape: tuple[int, ...]
    error: float  # largest absolute difference; for gradients the relative one
    passed: bool
    note: str = ""


def read_case(path):
    """All arrays of a case.

    Raises:
        CheckpointError: not an .npz, or one with pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, *_DAMAGED) as error:
        raise CheckpointError(f"{path.name}: not a readable .npz case: {error}") from error


def _close(case, output, ours, golden, where=None):
    """Compare to ATOL and RTOL (integers exactly), at the positions `where` if given."""
    ours, golden = np.asarray(ours), np.asarray(golden)
    if ours.shape != golden.shape:
        return Comparison(case, output, golden.shape, np.inf, False, f"ours has shape {ours.shape}")
    a, b = (x if where is None else x[where] for x in (ours, golden))
    exact = golden.dtype.kind in "iub"
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    bound = 0.0 if exact else ATOL + RTOL * np.abs(b)
    passed = bool(np.all(difference <= bound))  # NaN is never near enough
    return Comparison(case, output, golden.shape, float(difference.max(initial=0.0)), passed)


def _finish(case, arrays, inputs, compared):
    """Turn outputs that nothing compared into failures."""
    seen = {c.output for c in compared}
    for key, array in arrays.items():
        if key not in seen and not inputs.fullmatch(key) and array.dtype.kind not in "US":
            compared.append(
                Comparison(case, key, array.shape, np.inf, False, "no such output is computed")
            )
    return compared


# --- Qwen2.5-VL -----------------------------------------------------------------------------------


def check_qwen(case, arrays, params, cfg, entries, sizes):
    """All comparisons of one Qwen2.5-VL case.

    Args:
        case: its name.
        arrays: from `read_case`.
        params: float32 parameters keyed by tower.
        cfg: VlmConfig.
        entries: the porting entries, to name gradients as the reference does.
        sizes: the table's axis sizes.
    """
    shape = arrays["input_ids"].shape if "input_ids" in arrays else ()
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
        array = arrays.get(key)
        if array is None and key != "labels":
            raise CheckpointError(f"{case}: array {key!r} is missing")
        if array is not None and (
            array.ndim != 2 or array.shape != shape or array.dtype.kind not in "iub"
        ):
            raise CheckpointError(
                f"{case}: {key} is {array.dtype}{list(array.shape)}: expected integers "
                "[B, T], as all token arrays"
            )
    compared = _preprocessing(case, arrays, cfg)
    valid = arrays["attention_mask"].astype(bool)
    media = {
        name: (arrays[pixels], arrays[f"{name}_grid_thw"])
        for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos"))
        if pixels in arrays
    }
    positions, deltas = mrope_positions(
        arrays["mm_token_type_ids"],
        valid,
        arrays.get("image_grid_thw", np.zeros((0, 3), int)),
        arrays.get("video_grid_thw", np.zeros((0, 3), int)),
        spatial_merge=cfg.vision.spatial_merge,
        tokens_per_second=cfg.tokens_per_second,
        seconds_per_grid=arrays.get("second_per_grid_ts"),
    )
    everywhere = np.broadcast_to(valid, positions.shape)
    if "position_ids" in arrays:
        compared.append(_close(case, "position_ids", positions, arrays["position_ids"], everywhere))
    if "rope_deltas" in arrays:
        compared.append(_close(case, "rope_deltas", deltas[:, None], arrays["rope_deltas"]))
    compared += _vision(case, arrays, params, cfg, media)
    batch = vlm_batch(
        arrays["input_ids"],
        arrays["mm_token_type_ids"],
        valid,
        positions,
        media.get("image"),
        media.get("video"),
        window=cfg.vision.window,
        merge=cfg.vision.spatial_merge,
    )
    compared += _language(case, arrays, params, cfg, batch, valid)
    if "labels" in arrays:
        compared += _gradients(case, arrays, params, cfg, batch, entries, sizes)
    return _finish(case, arrays, _QWEN_INPUTS, compared)


def _preprocessing(case, arrays, cfg):
    """The stored patches against ours from the stored images."""
    compared = []
    preprocessor = images_lib.PreprocessorConfig(max_pixels=28 * 28 * 1280)
    images = sorted((k for k in arrays if re.fullmatch(r"image_\d+", k)), key=lambda k: int(k[6:]))
    if images and "pixel_values" in arrays:
        patches, grids = zip(
            *(images_lib.image_patches(arrays[k], preprocessor) for k in images), strict=True
        )
        compared.append(_close(case, "image_grid_thw", np.stack(grids), arrays["image_grid_thw"]))
        compared.append(
            _close(case, "pixel_values", np.concatenate(patches), arrays["pixel_values"])
        )
    if "frames" in arrays and "pixel_values_videos" in arrays:
        patches, grid = images_lib.video_patches(arrays["frames"], preprocessor)
        compared.append(_close(case, "video_grid_thw", grid[None], arrays["video_grid_thw"]))
        compared.append(_close(case, "pixel_values_videos", patches, arrays["pixel_values_videos"]))
    return compared


def _vision(case, arrays, params, cfg, media):
    """The vision tower on all of a case's images as one row, then on its videos."""
    compared = []
    for name, (pixels, grids) in media.items():
        layout = patch_windows(grids, window=cfg.vision.window, merge=cfg.vision.spatial_merge)
        filled = layout.source != EMPTY
        outputs = _vision_outputs(
            params,
            cfg,
            layout.gather(pixels)[None],
            layout.positions[None],
            layout.segments[None],
        )
        unit = cfg.vision.spatial_merge**2
        frame_sizes = np.repeat(grids[:, 1] * grids[:, 2], grids[:, 0])
        order = layout.source[filled]  # rows of pixel_values in window order
        back = np.argsort(order)
        windows = filled.sum(axis=1)
        results = {
            "window_index": order[::unit] // unit,
            "cu_window_seqlens": np.concatenate([[0], np.cumsum(windows[windows > 0])]),
            "cu_seqlens": np.concatenate([[0], np.cumsum(frame_sizes)]),
            "vision_pos_hw": layout.positions[filled][back],
            "vision_patch_embed": outputs["embedded"][0][filled][back],
            "vision_blocks_windowed": outputs["blocks"][:, 0][:, filled],
            "vision_last_windowed": outputs["last"][0][filled],
            "vision_merged": outputs["merged"][0].reshape(-1, cfg.projector.width)[layout.tokens],
        }
        suffix = "" if name == "image" else "_video"
        compared += [
            _close(case, key + suffix, ours, arrays[key + suffix])
            for key, ours in results.items()
            if key + suffix in arrays
        ]
    return compared


def _vision_outputs(params, cfg, patches, positions, segments):
    """The tower's embedding, every block, the last one and the merged tokens, as NumPy arrays."""
    no_blocks = dataclasses.replace(cfg.vision, depth=0)

    @jax.jit
    def run(params, patches, positions, segments):
        vision = params["vision"]
        cut = vision | {"layers": jax.tree.map(lambda x: x[:0], vision["layers"])}
        inputs = (patches, positions, segments)
        embedded, _ = QwenVision(no_blocks).apply({"params": cut}, *inputs)
        last, blocks = QwenVision(cfg.vision).apply(
            {"params": vision}, *inputs, taps=tuple(range(cfg.vision.depth))
        )
        merged = Projector(cfg.projector).apply({"params": params["projector"]}, last)
        return {"embedded": embedded, "blocks": blocks, "last": last, "merged": merged}

    return jax.tree.map(np.asarray, run(params, patches, positions, segments))


def _language(case, arrays, params, cfg, batch, valid):
    """Logits, layers and cache of the whole sequence, then the greedy continuation."""

    @jax.jit
    def run(params, batch):
        hidden, kv, layers = vlm.forward(params, cfg, batch, taps=tuple(range(cfg.language.depth)))
        return vlm.logits(params, hidden), kv, layers

    logits, (keys, values), layers = jax.tree.map(np.asarray, run(params, batch))
    compared = []
    for output, ours in (
        ("logits", logits),
        ("text_layers_out", layers),
        ("cache_k", keys.transpose(0, 1, 3, 2, 4)),
        ("cache_v", values.transpose(0, 1, 3, 2, 4)),
    ):
        if output in arrays:
            where = valid
            if output == "text_layers_out":
                where = np.broadcast_to(valid, layers.shape[:3])
            elif output.startswith("cache"):
                where = np.broadcast_to(valid[None, :, None], ours.shape[:4])
            compared.append(_close(case, output, ours, arrays[output], where))
    if arrays.get("generated_ids", np.zeros(0)).ndim == 2:
        steps = arrays["generated_ids"].shape[1]

        @jax.jit
        def continue_greedily(params, batch):
            return vlm.generate(params, cfg, batch, max_new_tokens=steps, keep_logits=True)

        tokens, kept = continue_greedily(params, batch)
        compared.append(_close(case, "generated_ids", tokens, arrays["generated_ids"]))
        if "generated_step_logits" in arrays:
            compared.append(
                _close(case, "generated_step_logits", kept, arrays["generated_step_logits"])
            )
    return compared


def _gradients(case, arrays, params, cfg, batch, entries, sizes):
    """The loss, and its gradients under the reference's names."""

    @jax.jit
    def loss_and_gradients(params, batch, labels):
        def loss(params):
            hidden, _, _ = vlm.forward(params, cfg, batch)
            return next_token_loss(vlm.logits(params, hidden), labels)

        return jax.value_and_grad(loss)(params)

    labels = jnp.asarray(arrays["labels"], jnp.int32)
    loss, gradients = loss_and_gradients(params, batch, labels)
    flat = {k: np.asarray(v) for k, v in tables.flatten(gradients).items()}
    ours = {entry.key: tables.to_foreign(entry, flat[entry.ours], sizes) for entry in entries}
    compared = []
    if "loss" in arrays:
        compared.append(_relative(case, "loss", loss, arrays["loss"]))
    by_letters = {_letters(key): key for key in ours}
    for name, array in arrays.items():
        prefix, _, key = name.partition("__")
        if prefix not in ("grad", "grad_norm", "grad_norms") or not key:
            continue
        known = by_letters.get(_letters(key))
        if known is None:
            compared.append(Comparison(case, name, array.shape, np.inf, False, "no such parameter"))
        elif prefix == "grad":
            compared.append(_relative(case, name, ours[known], array))
        else:
            compared.append(_relative(case, name, np.linalg.norm(ours[known]), array))
    if "grad_norms" in arrays:
        compared.append(_gradient_norms(case, arrays, ours, by_letters))
    return compared


def _gradient_norms(case, arrays, ours, by_letters):
    """All L2 norms: by name where the case gives names, else as sorted lists."""
    golden, names = arrays["grad_norms"], None
    if golden.dtype.kind in "US":  # one JSON object, name: norm
        named = json.loads(str(golden))
        names, golden = list(named), np.array(list(named.values()))
    else:
        lists = [x for x in arrays.values() if x.dtype.kind in "US" and x.shape == golden.shape]
        names = lists[0].astype(str).tolist() if lists else None
    if names is None:
        norms = np.sort([np.linalg.norm(x) for x in ours.values()])
        norms = norms[norms > 0] if norms.shape != golden.shape else norms  # towers without input
        return _relative(case, "grad_norms", norms, np.sort(golden), each=True, note="sorted")
    if unknown := [name for name in names if _letters(name) not in by_letters]:
        note = f"no such parameter: {unknown[0]}"
        return Comparison(case, "grad_norms", golden.shape, np.inf, False, note)
    norms = np.array([np.linalg.norm(ours[by_letters[_letters(name)]]) for name in names])
    return _relative(case, "grad_norms", norms, golden, each=True)


def _letters(key):
    """A parameter's name whatever separators and in-memory prefixes a dump used."""
    key = re.sub(
        r"^model[._]+(language_model|visual)[._]+",
        lambda m: "model." if m[1][0] == "l" else "visual.",
        key,
    )
    return re.sub(r"[^0-9a-z]", "", key.lower())


def _relative(case, output, ours, golden, *, each=False, note=""):
    """Compare by relative L2 error, of the whole array or of each number."""
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    if ours.shape != golden.shape:
        return Comparison(case, output, golden.shape, np.inf, False, f"ours has shape {ours.shape}")
    size = np.abs if each else np.linalg.norm
    scale = np.maximum(size(golden), 1e-5)  # below that a float32 gradient is rounding
    error = np.max(size(ours - golden) / scale, initial=0.0)
    return Comparison(case, output, golden.shape, float(error), bool(error <= GRADIENT_RTOL), note)


# --- VGGT -----------------------------------------------------------------------------------------


def check_vggt(case, arrays, params, cfg):
    """All comparisons of one VGGT case.

    Args:
        case: its name.
        arrays: from `read_case`.
        params: {"geometry": float32 parameters}; unused for a case of parts.
        cfg: VggtConfig.
    """
    if "images_u8" not in arrays:
        return _finish(case, arrays, _VGGT_INPUTS, _parts(case, arrays, cfg))
    images = arrays["images_u8"].transpose(0, 1, 3, 4, 2)

    @jax.jit
    def run(geometry, images):
        images = images.astype(jnp.float32) / 255.0
        mean, std = (
            jnp.reshape(jnp.asarray(x), (1, 1, 1, 3)) for x in (vggt.IMAGE_MEAN, vggt.IMAGE_STD)
        )
        flat = (images.reshape(-1, *images.shape[2:]) - mean) / std
        patches = vggt.PatchTokens(cfg).apply({"params": geometry["patch_tokens"]}, flat)
        taps = tuple(range(cfg.depth))
        return patches, vggt.Vggt(cfg).apply({"params": geometry}, images, taps=taps)

    patches, aggregated = run(params["geometry"], images)
    results = {
        "patch_tokens": patches,
        "aggregated": aggregated,
        "patch_start_idx": np.asarray(cfg.num_special),
    }
    if cfg.dino is not None:
        rows, columns = (side // cfg.patch_size for side in images.shape[2:4])
        pos_embed = params["geometry"]["patch_tokens"]["dino"]["pos_embed"]
        results["pos_embed_interpolated"] = dinov2.resize_pos_embed(pos_embed, rows, columns)[None]
    compared = [
        _close(case, key, ours, arrays[key]) for key, ours in results.items() if key in arrays
    ]
    return _finish(case, arrays, _VGGT_INPUTS, compared)


def _parts(case, arrays, cfg):
    """2D rotary embedding and antialiased resizing by themselves."""
    compared = []
    if {"rope_in", "rope_pos", "rope_out"} <= set(arrays):
        x = jnp.asarray(arrays["rope_in"]).transpose(0, 2, 1, 3)
        angles = attention.rotary(jnp.asarray(arrays["rope_pos"]), x.shape[-1] // 2, cfg.rope_theta)
        ours = attention.rotate(x, angles).transpose(0, 2, 1, 3)
        compared.append(_close(case, "rope_out", ours, arrays["rope_out"]))
    for key, golden in arrays.items():
        if "grid37" in arrays and re.fullmatch(r"grid\d+(x\d+)?", key) and key != "grid37":
            grid = arrays["grid37"][0].transpose(1, 2, 0)
            flat = jnp.asarray(np.concatenate([grid[:1, 0], grid.reshape(-1, grid.shape[-1])]))
            rows, columns = golden.shape[2:]
            ours = dinov2.resize_pos_embed(flat, rows, columns)[1:]
            ours = ours.reshape(rows, columns, -1).transpose(2, 0, 1)[None]
            compared.append(_close(case, key, ours, golden))
    return compared
