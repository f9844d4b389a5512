"""The same answers on a GPU; skipped where there is none."""

from pathlib import Path

import pytest
import torch

from medplib import MedPLIB, MoERouter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def test_router_on_cuda_chooses_and_answers_as_on_cpu():
    torch.manual_seed(0)
    router = MoERouter(32, experts=["a", "b", "c"], hidden_dim=64, top_k=2)
    x = torch.randn(5, 7, 32)
    expected = router(x)
    torch.testing.assert_close(router.cuda()(x.cuda()).cpu(), expected, atol=1e-5, rtol=1e-4)


def test_tiny_model_on_cuda_gives_the_text_and_masks_of_the_cpu():
    image = Path(__file__).parents[1] / "examples" / "images" / "chest_ct.png"
    model = MedPLIB.from_pretrained("medplib-tiny")
    expected = model.segment(image, ["right lung", "body"])
    answer = model.cuda().segment(image, ["right lung", "body"])
    assert answer.text == expected.text
    assert len(answer.findings) == len(expected.findings)
    for a, b in zip(answer.findings, expected.findings, strict=True):
        assert (a.mask != b.mask).mean() < 1e-3
