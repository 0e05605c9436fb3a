import pytest
import torch

from projects.llava_sam2_rl.engine.memory import peak_extra_bytes


def test_peak_extra_bytes_counts_the_peak_not_the_sum():
    def work():
        for _ in range(3):
            torch.zeros(1000, 1000)
        return torch.zeros(500, 1000)

    assert peak_extra_bytes(work) == pytest.approx(4_000_000, rel=0.01)
    assert peak_extra_bytes(lambda: torch.zeros(10, 1000) + 1) == pytest.approx(80_000, rel=0.01)
