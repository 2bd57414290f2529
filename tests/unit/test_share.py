"""A batch split among any number of ranks: each row once, equally many network calls per rank.

The gradient is that of the mean over the batch.
"""

import pytest
import torch

from glide_ray.train.batch_split import BatchSplit


@pytest.mark.parametrize(
    "batch, world, micro_batch",
    [(8, 2, 4), (8, 3, 2), (2048, 504, 4), (7, 5, 1), (5, 2, 1), (3, 3, 8), (64, 7, 5)],
)
def test_each_row_is_computed_once_and_weighted_calls_average_to_the_batch_mean(
    batch, world, micro_batch
):
    values = torch.randn(batch, dtype=torch.float64)
    shares = [BatchSplit(batch, world, rank, micro_batch) for rank in range(world)]
    assert {len(list(share.row_ranges())) for share in shares} == {shares[0].calls}
    calls = [part for share in shares for part in share.row_ranges()]
    assert all(0 <= first < end <= batch and end - first <= micro_batch for first, end, _ in calls)
    assert sorted(
        row for first, end, weight in calls if weight for row in range(first, end)
    ) == list(range(batch))
    mean = sum(weight * values[first:end].mean() for first, end, weight in calls) / len(calls)
    assert torch.allclose(mean, values.mean())


def test_equal_micro_batches_have_weight_one():
    assert [weight for _, _, weight in BatchSplit(32, 4, 2, 4).row_ranges()] == [1, 1]
