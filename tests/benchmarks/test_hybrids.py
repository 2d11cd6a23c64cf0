"""What bench_hybrids times is the same work: one layer's thoughts, packed and as whole sequences."""

import pytest
import torch
from benchmark_files import benchmark

bench_hybrids = benchmark("bench_hybrids")


@pytest.mark.parametrize("what", bench_hybrids.LAYERS)
def test_all_contestants_have_the_same_gradients(what: str, monkeypatch):
    monkeypatch.setattr(bench_hybrids, "LENGTH", 9)
    runs = bench_hybrids.Runs(bench_hybrids.body(*bench_hybrids.LAYERS[what]), slots=3)

    def gradients(run) -> torch.Tensor:
        run()
        return torch.cat([p.grad.flatten() for p in runs.body.layers.parameters()])

    wanted = gradients(runs.one_by_one)
    for run in (runs.step(runs.packed), runs.step(runs.in_one_batch)):
        assert (gradients(run) - wanted).abs().max() < 1e-4 * wanted.abs().max()
