"""The cuDNN that is loaded is the one that torch was built for, also once Transformer Engine has been imported."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.needs("cuda", "engine")


def test_torchs_cudnn_is_loaded_after_transformer_engine_is_imported():
    import transformer_engine.pytorch  # noqa: F401

    from megatron_nft.policy.cudnn import bundled_cudnn, cudnn_versions

    built, loaded = cudnn_versions()
    assert torch.backends.cudnn.version() == loaded[0] * 10000 + loaded[1] * 100 + loaded[2]  # it raises if older
    if bundled_cudnn() is not None:
        assert loaded == built
    with open("/proc/self/maps", encoding="utf-8") as maps:
        files = {line.split()[-1] for line in maps if "/libcudnn.so" in line}
    assert len(files) == 1, files


def test_the_doctors_layer_runs():
    from megatron_nft.plan.doctor.deep import transformer_engine_layer

    assert transformer_engine_layer() == ""
