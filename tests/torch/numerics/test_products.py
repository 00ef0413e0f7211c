"""Products of float32 matrices by either library: the same numbers, the same gradients."""

import pytest
import torch
import torch.nn.functional as F
from material import random_groups
from torch import nn

from posttrain.engines.local.recompute import Recomputation
from posttrain.engines.local.recording import Recording
from posttrain.numerics import matmul as products
from posttrain.numerics.batch import pack
from posttrain.numerics.matmul import linear_layers, product, weight_gradient

MAKERS = {"MKL": "GenuineIntel", "oneDNN": "AuthenticAMD"}


@pytest.fixture
def choose(monkeypatch):
    """Have one library or the other compute, as if the processor were of that maker."""
    if not products.has_both():
        pytest.skip("this torch has only one of the libraries: there is nothing to choose")

    def chosen(name):
        monkeypatch.setattr(products, "maker", lambda: MAKERS[name])
        products.by_onednn.cache_clear()
        assert products.by_onednn() == (name == "oneDNN")

    yield chosen
    products.by_onednn.cache_clear()


@pytest.fixture(params=MAKERS)
def library(request, choose):
    """The test runs with one library, then with the other."""
    choose(request.param)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 3, 64, 257])
def test_a_product_is_the_same_for_any_strides(library, rows):
    x, w, bias = randn(rows, 48), randn(20, 48), randn(20)
    wanted = (x.double() @ w.double().t() + bias).float()
    for given_x in (x, x.t().contiguous().t()):
        for given_w in (w, w.t().contiguous().t()):
            assert torch.allclose(product(given_x, given_w, bias), wanted, atol=2e-5)
    assert torch.allclose(product(x[None], w, bias), wanted[None], atol=2e-5)


@pytest.mark.parametrize("outputs", [5, 48, 1000])
def test_a_weights_gradient_is_the_same_for_any_shape(library, outputs):
    grad, x = randn(33, outputs), randn(33, 48)
    wanted = (grad.double().t() @ x.double()).float()
    assert torch.allclose(weight_gradient(grad, x), wanted, atol=2e-4)
    assert torch.equal(weight_gradient(grad[:0], x[:0]), torch.zeros(outputs, 48))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("bias",)])
def test_gradients_are_those_of_the_stock_layer(library, bias, frozen):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=bias), randn(2, 9, 24)

    def run():
        leaves = {"x": x.clone(), **dict(layer.named_parameters())}
        for name, leaf in leaves.items():
            leaf.grad = None
            leaf.requires_grad_(name not in frozen)
        out = layer(leaves["x"])
        out.square().sum().backward()
        return out, {n: leaf.grad for n, leaf in leaves.items()}

    wanted, wanted_grads = run()
    with linear_layers():
        found, found_grads = run()
    assert torch.allclose(found, wanted, atol=1e-5)
    for name, grad in wanted_grads.items():
        assert (grad is None) == (found_grads[name] is None) == (name in frozen)
        assert grad is None or torch.allclose(found_grads[name], grad, rtol=1e-4, atol=1e-4)


def test_no_rows_have_a_gradient_of_zero(library):
    layer = nn.Linear(4, 3)
    with linear_layers():
        layer(torch.empty(0, 4)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(3, 4))


def test_only_float32_on_a_cpu_is_taken_over(library):
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with linear_layers():
        assert F.linear(x, x).dtype == torch.bfloat16
        assert F.linear(x.double(), x.double()).dtype == torch.float64
        assert F.linear(x.to("meta"), x.to("meta")).device.type == "meta"


def test_a_model_is_the_same_function_and_is_recorded(learner, choose):
    """Hidden states and gradients by either library, and the recording that samples."""
    model = learner.policy.model
    (batch,) = pack(random_groups(), needs=(), max_tokens=10_000)
    found = {}
    for name in MAKERS:
        choose(name)
        model.causal.zero_grad()
        states = model.predicting(batch)
        states.square().sum().backward()
        found[name] = [states.detach(), *(p.grad for p in model.causal.base_model.parameters())]
        recording = Recording(model.causal)
        recording.prepare()
        assert recording.refusal is None
        assert (name == "oneDNN") == ("mkldnn" in str(recording._body.inlined_graph))
    for one, other in zip(*found.values(), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_layers_computed_again_use_the_same_library(library, learner):
    model = learner.policy.model
    (batch,) = pack(random_groups(), needs=(), max_tokens=10_000)

    def gradients(recomputed):
        model.causal.zero_grad()
        with recomputed.on():
            states = model.predicting(batch)
        states.square().sum().backward()
        return [p.grad for p in model.causal.base_model.parameters()]

    recomputed = Recomputation([model])
    found = gradients(recomputed)
    recomputed._layers = []
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(recomputed), strict=True))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("processor : 0\nvendor_id\t: AuthenticAMD\nvendor_id\t: GenuineIntel\n", "AuthenticAMD"),
        ("processor : 0\nCPU implementer : 0x41\n", ""),
        (None, "GenuineIntel"),
    ],
)
def test_the_maker_is_read_off_the_system(tmp_path, monkeypatch, text, wanted):
    facts = tmp_path / "cpuinfo"
    if text is not None:
        facts.write_text(text)
    monkeypatch.setattr(products, "CPU_FACTS", facts)
    monkeypatch.setattr(
        products.platform, "processor", lambda: "Intel64 Family 6 Model 158, GenuineIntel"
    )
    assert products.maker() == wanted


def test_what_the_user_says_about_caches_stands(choose, monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    choose("oneDNN")
    assert products.os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert products.os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(products.SHAPES)
