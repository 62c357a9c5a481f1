"""Attention kernels by name: which are refused and why, and packages behind one operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.wan import kernels
from model.wan.attention import attend, use_kernel
from model.wan.context import Context
from model.wan.kernels import BACKENDS, KERNELS, PACKAGES, Shape, chosen, compute, fault, measure
from model.wan.masks import FrameMask, block_causal
from model.wan.transformer import WanTransformer
from tests.devices import difference
from utils.errors import UserError

CPU = torch.device("cpu")
WanFactory = Callable[..., WanTransformer]


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * scale


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = scores(q, k, scale)
    out = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v.float())
    return out.to(q.dtype), logits.logsumexp(-1)


def slopes(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass from output and log-sum-exp, as in arXiv:2205.14135 appendix B."""
    p = (scores(q, k, scale) - lse[..., None]).exp()
    dp = torch.einsum("bnhd,bmhd->bhnm", dout, v)
    ds = p * (dp - (dout * out).sum(-1).transpose(1, 2)[..., None]) * scale
    return (
        torch.einsum("bhnm,bmhd->bnhd", ds, k),
        torch.einsum("bhnm,bnhd->bmhd", ds, q),
        torch.einsum("bhnm,bnhd->bmhd", p, dout),
    )


def flash2() -> Any:
    """A package with the signatures of flash-attn 2.8."""

    def _flash_attn_forward(  # noqa: PLR0917
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: Tensor | None, return_softmax: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        assert (dropout_p, causal, softcap, alibi_slopes, return_softmax) == (
            0.0, False, 0.0, None, False,
        )  # fmt: skip
        assert window_size_left == window_size_right == -1
        return *formula(q, k, v, softmax_scale), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(  # noqa: PLR0917
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert not (dropout_p or causal or softcap or alibi_slopes or deterministic or rng_state)
        assert window_size_left == window_size_right == -1
        found = slopes(dout, q, k, v, out, softmax_lse, softmax_scale)
        for place, value in zip((dq, dk, dv), found, strict=True):
            place.copy_(value)
        return torch.empty(0)

    return SimpleNamespace(
        _flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward
    )


def flash3() -> Any:
    """A package with signatures of flash-attn 3: more of them, and other names."""

    def _flash_attn_forward(  # noqa: PLR0917
        q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None, v_new: Tensor | None,
        cu_seqlens_q: Tensor | None, max_seqlen_q: int | None, softmax_scale: float, causal: bool,
        window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
        num_splits: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        assert (k_new, v_new, cu_seqlens_q, max_seqlen_q) == (None, None, None, None)
        assert (causal, window_size, attention_chunk, softcap) == (False, (-1, -1), 0, 0.0)
        assert num_splits == 1
        return *formula(q, k, v, softmax_scale), None

    def _flash_attn_backward(  # noqa: PLR0917
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None, sequed_q: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
        softmax_scale: float, is_causal: bool, window_size_left: int = 0, sm_margin: int = 0,
    ) -> None:  # fmt: skip
        assert (cu_seqlens_q, sequed_q, is_causal, window_size_left) == (None, None, False, -1)
        assert sm_margin == 0
        found = slopes(dout, q, k, v, out, softmax_lse, softmax_scale)
        for place, value in zip((dq, dk, dv), found, strict=True):
            place.copy_(value)

    return SimpleNamespace(
        _flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward
    )


def sage() -> Any:
    """A package with the signature of SageAttention."""

    def sageattn(
        q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False
    ) -> Tensor:
        assert (tensor_layout, is_causal) == ("NHD", False)
        return formula(q, k, v, 1.0 / math.sqrt(q.shape[-1]))[0]

    return SimpleNamespace(sageattn=sageattn)


INSTALLED = {"flash2": flash2(), "flash3": flash3(), "sage": sage()}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "package", INSTALLED.__getitem__)


def inputs(keys: int = 7) -> list[Tensor]:
    """Queries of 5 tokens; keys and values of another number."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 3, 8, generator=rng).requires_grad_() for n in (5, keys, keys)]


def by_package(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    out: Tensor = torch.ops.fewstep.attention(q, k, v, kernel)[0]
    return out


def outcome(function: Callable[..., Tensor], kernel: str, keys: int = 7) -> list[Tensor]:
    """Output and gradients."""
    x = inputs(keys)
    out = function(*x, kernel)
    return [out, *torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), x)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(difference(a, b) < 2e-6 for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kernel", ["flash2", "flash3"])
def test_a_packages_kernel_has_the_values_and_gradients_of_the_formula(kernel: str) -> None:
    assert_same(outcome(by_package, kernel), outcome(compute, "math"))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kernel", ["flash2", "flash3"])
def test_a_packages_kernel_breaks_no_graph_and_keys_may_grow(kernel: str) -> None:
    torch.compiler.reset()
    graph = torch.compile(by_package, fullgraph=True, dynamic=False, backend="aot_eager")

    def call(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
        for grown in (k, v):
            torch._dynamo.mark_dynamic(grown, 1)
        out: Tensor = graph(q, k, v, kernel)
        return out

    for keys in (7, 11):
        assert_same(outcome(call, kernel, keys), outcome(compute, "math", keys))


@pytest.mark.usefixtures("installed")
def test_sage_serves_inference_and_refuses_a_gradient() -> None:
    with torch.no_grad():
        assert_same([by_package(*inputs(), "sage")], [compute(*inputs(), "math")])
    with pytest.raises(UserError, match="no backward pass: it serves inference alone"):
        by_package(*inputs(), "sage")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kernel", ["flash2", "flash3", "sage"])
def test_operators_describe_their_results_to_compilers(kernel: str) -> None:
    x = [t.detach().requires_grad_(kernel != "sage") for t in inputs()]
    tests = ("test_schema", "test_faketensor")
    if kernel != "sage":
        tests += ("test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fewstep.attention.default, (*x, kernel), test_utils=tests)


@pytest.mark.parametrize("kernel", ["flash", "math", "sdpa"])
def test_torchs_backends_agree(kernel: str) -> None:
    assert fault(kernel, CPU, torch.float32, grad=True) is None
    assert_same(outcome(compute, kernel), outcome(compute, "math"))


@pytest.mark.parametrize("kernel", PACKAGES)
def test_a_package_is_refused_where_it_cannot_run(kernel: str) -> None:
    assert fault(kernel, CPU, torch.float32, grad=False) == "it needs a CUDA device and bf16"
    with pytest.raises(UserError) as caught:
        chosen(kernel, Shape(16, 2, 8), CPU, torch.float32, grad=False)
    assert str(caught.value) == (
        f"attention '{kernel}' cannot be used: it needs a CUDA device and bf16; choose auto, "
        f"or another"
    )


def test_an_unknown_kernel_names_those_that_there_are() -> None:
    with pytest.raises(UserError, match="attention 'fast' is unknown, choose auto or one of sdpa"):
        chosen("fast", Shape(16, 2, 8), CPU, torch.float32, grad=False)


def test_without_a_gpu_auto_is_torchs_own_choice() -> None:
    assert chosen("auto", Shape(16, 2, 8), CPU, torch.float32, grad=True) == "sdpa"


def test_a_kernel_that_computes_something_else_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
        return compute(q, k, v, kernel) * (1.0 if kernel == "math" else 1.1)

    monkeypatch.setattr(kernels, "compute", wrong)
    told = fault("flash", CPU, torch.float32, grad=True)
    assert told is not None
    assert told.startswith("it differs from the formula by 2.1e-01")


def test_a_kernel_that_fails_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
        raise RuntimeError("no such device\nand much more")

    monkeypatch.setattr(kernels, "compute", broken)
    assert fault("cudnn", CPU, torch.float32, grad=False) == "it fails here: no such device"


def test_every_kernel_is_timed_or_says_why_not() -> None:
    found = dict(measure(Shape(16, 2, 8), CPU, torch.float32, grad=True))
    assert tuple(found) == KERNELS
    assert {name for name, value in found.items() if isinstance(value, float)} >= {"sdpa", "math"}
    assert all(isinstance(found[name], str) for name in PACKAGES)


def test_a_network_computes_all_attention_by_the_kernel_it_is_told(
    tiny_wan: WanFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny_wan(), []

    def noting(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
        seen.append(kernel)
        return compute(q, k, v, kernel)

    monkeypatch.setattr("model.wan.attention.compute", noting)
    use_kernel(model, "math")
    x, text = torch.zeros(1, 16, 2, 4, 4), torch.zeros(1, 12, 64)
    model(x, torch.ones(1, 1), text)
    assert seen == ["math", "math"] * len(model.blocks)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_a_network_computes_masked_attention_as_it_is_told(tiny_wan: WanFactory) -> None:
    model, x, text = tiny_wan(), torch.ones(1, 16, 4, 4, 4), torch.zeros(1, 12, 64)
    found = []
    for way in ("blocks", "flex"):
        use_kernel(model, "sdpa", way)
        with torch.no_grad():
            context = Context(mask=block_causal([2, 2]))
            found.append(model(x, torch.ones(1, 1), text, context=context))
    kinds = {type(mask) for key, mask in model.memo._values.items() if key[0] == "mask"}
    assert kinds == {FrameMask, BlockMask}
    torch.testing.assert_close(*found, atol=1e-5, rtol=0.0)


def test_masked_attention_uses_the_kernel_too() -> None:
    x = [t.detach() for t in inputs(5)]
    q, k, v = (t[:, :4] for t in x)
    found = [attend(q, k, v, mask=block_causal([1, 1]), kernel=name) for name in ("sdpa", "math")]
    assert_same(found[:1], found[1:])
    assert set(BACKENDS) < set(KERNELS)
