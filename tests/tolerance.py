"""The one tolerance of the tests: at most twice torch's own error in the same dtype."""

from torch import Tensor


def assert_close_to_float64(out: Tensor, torch_same_dtype: Tensor, reference64: Tensor) -> None:
    """``max|out - reference64| <= 2 max|torch_same_dtype - reference64| + 1e-6``; all of one shape, all finite."""
    assert out.shape == torch_same_dtype.shape == reference64.shape, (out.shape, reference64.shape)
    assert out.dtype == torch_same_dtype.dtype, (out.dtype, torch_same_dtype.dtype)
    if not out.numel():
        return
    error = (out.double() - reference64.to(out.device)).abs().max().item()
    allowed = 2 * (torch_same_dtype.double() - reference64.to(torch_same_dtype.device)).abs().max().item() + 1e-6
    assert error <= allowed, f"off by {error:.3e}; torch's own error in {out.dtype} allows {allowed:.3e}"
