"""Whether a covariance holds the sums over given rows."""

import torch


def assert_sums(covariance, rows, rtol=1e-12):
    """``covariance`` holds the sums over ``rows`` (tokens, features)."""
    rows, covariance = rows.double(), covariance.about(None)
    moment = rows.T @ rows
    assert covariance.count == len(rows)
    torch.testing.assert_close(
        covariance.total.double(), rows.sum(0), rtol=rtol, atol=rtol * float(rows.abs().sum(0).max())
    )
    torch.testing.assert_close(covariance.second_moment.double(), moment, rtol=0, atol=rtol * float(moment.abs().max()))
