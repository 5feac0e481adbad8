"""A product by a weight that was put in order once is the plain product, for any number of rows and threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from sluice.engines import products
from sluice.engines.products import Product
from sluice.engines.threads import StepThreads


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 896), (448, 128), (100, 37), (896, 1152)])
@pytest.mark.parametrize("ordered_by", [1, 2])
@pytest.mark.parametrize("library", ["mkl", "onednn"])
@torch.inference_mode()
def test_an_ordered_weight_serves_any_number_of_rows_and_threads(
    inputs: int, outputs: int, ordered_by: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which MKL does not promise, and without which products of most steps would be wrong."""
    if not getattr(torch.backends, {"onednn": "mkldnn"}.get(library, library)).is_available():
        pytest.skip(f"torch has no {library}")
    monkeypatch.setattr(products, "product_library", lambda: library)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    torch.set_num_threads(ordered_by)
    product = Product(weight, StepThreads(torch.device("cpu")))
    product.refresh()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in [*range(1, 70), 128, 255, 256, 1000]:
            x, residual = (
                torch.randn(rows, inputs, generator=generator),
                torch.randn(rows, outputs, generator=generator),
            )
            plain = F.linear(x.double(), weight.double(), bias.double())
            assert torch.allclose(product(x, bias).double(), plain, atol=1e-3, rtol=1e-4), (threads, rows)
            both = plain - bias.double() + residual.double()
            assert torch.allclose(product.added_to(residual, x).double(), both, atol=1e-3, rtol=1e-4), (threads, rows)


@torch.inference_mode()
def test_a_weight_that_changed_is_put_in_order_again() -> None:
    weight, x = torch.randn(64, 32), torch.randn(5, 32)
    product = Product(weight, StepThreads(torch.device("cpu")))
    product.refresh()
    weight.mul_(-2.0)
    product.refresh()
    torch.testing.assert_close(product(x), F.linear(x, weight), rtol=1e-4, atol=1e-4)
