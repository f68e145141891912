import json
import types

import jax
import pytest

from gear_jax.train.log import Log, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("cpu", None),
    ],
)
def test_a_device_has_its_own_peak_and_an_unknown_one_none(kind, peak):
    assert peak_flops(kind) == peak


def test_utilisation_is_the_models_work_over_what_all_devices_can_do(tmp_path, monkeypatch):
    monkeypatch.setattr("gear_jax.train.log.peak_flops", lambda kind: 1e6)
    rows = {}
    for flops in (2e6, None):
        said = []
        config = types.SimpleNamespace(log_every=1, max_bad_steps=2)
        log = Log(tmp_path, 0, 5, config, flops, said.append)
        log.step(1, {"loss": 0.5, "bad_steps": 0}, range(8))
        log.close()
        rows[flops] = json.loads((tmp_path / "metrics.jsonl").read_text())
    speed = rows[2e6]["samples_per_second"]
    assert rows[2e6]["mfu"] == pytest.approx(speed * 2e6 / (jax.device_count() * 1e6))
    assert "mfu" not in rows[None]
    assert "minutes_left" in said[0]
