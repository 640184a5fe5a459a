"""torch.fx and what is built on it: the block is one node, and what was traced serves other batches and sizes."""

import copy
import operator

import pytest
import timm
import torch
from randomise import randomise
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor

from timm_cbam2 import Cbam2

SHAPES = [(2, 3, 64, 64), (1, 3, 96, 64), (3, 3, 32, 32)]  # the last ends in a single position
NETWORKS = {
    "test_resnet_cbam2": ("layer2", "layer1.0.se"),
    "test_convnext_cbam2": ("stages.1", "stages.0.blocks.0.attn"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_traced_network_serves_other_batches_and_sizes(name):
    kwargs = dict(depths=(1, 1, 1, 1)) if "convnext" in name else {}
    model = randomise(timm.create_model(name, **kwargs)).eval()
    traced = symbolic_trace(model)
    nodes = [
        n for n in traced.graph.nodes if n.op == "call_module" and isinstance(model.get_submodule(n.target), Cbam2)
    ]
    assert len(nodes) == sum(isinstance(m, Cbam2) for m in model.modules())
    stage, block = NETWORKS[name]
    extractor = create_feature_extractor(model, {stage: "stage", block: "attended"})
    outputs = {}
    handle = model.get_submodule(block).register_forward_hook(lambda module, args, out: outputs.update(attended=out))
    model.get_submodule(stage).register_forward_hook(lambda module, args, out: outputs.update(stage=out.clone()))
    for shape in SHAPES:
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)
            found = extractor(x)
        for key, value in outputs.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)
    handle.remove()
    train = copy.deepcopy(traced).train()
    train(torch.randn(SHAPES[0])).sum().backward()
    assert all(p.grad is not None for p in train.parameters())


def test_a_traced_block_serves_other_batches_and_sizes():
    block = randomise(Cbam2(6)).eval()
    traced = symbolic_trace(block)
    for shape in ((1, 6, 1, 1), (3, 6, 5, 9)):
        x = torch.randn(shape)
        assert torch.allclose(traced(x), block(x), atol=1e-6)

    class Ends(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.act = block, torch.nn.ReLU()

        def forward(self, x):
            return self.attn(x, shortcut=x, act=self.act)

    x = torch.randn(2, 6, 4, 4)
    assert torch.allclose(symbolic_trace(Ends())(x), (x + block(x)).relu(), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_quantisation_by_fx_leaves_the_attention_as_it_is():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = torch.ao.quantization.get_default_qconfig_mapping(torch.backends.quantized.engine)
    model, x = randomise(timm.create_model("test_resnet_cbam2")).eval(), torch.randn(2, 3, 64, 64)
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,))
    prepared(x)
    quantised = quantize_fx.convert_fx(prepared)
    assert isinstance(quantised.get_submodule("layer1.0.se"), Cbam2)
    for shape in SHAPES[:2]:
        x = torch.randn(shape)
        with torch.no_grad():
            expected, got = model(x), quantised(x)
        assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.95


def test_an_exported_graph_has_no_operation_that_converters_do_not_know():
    model = timm.utils.reparameterize_model(timm.create_model("resnet20_cbam2", cbam2_stages=[2])).eval()
    dynamic = {name: torch.export.Dim.DYNAMIC for name in (0, 2, 3)}
    program = torch.export.export(model, (torch.randn(2, 3, 40, 40),), dynamic_shapes=(dynamic,))
    functions = [node.target for node in program.graph.nodes if node.op == "call_function"]
    # What is not torch's own computes a size, as of any strided convolution.
    assert {f for f in functions if not isinstance(f, torch._ops.OpOverload)} <= {operator.add, operator.floordiv}
    names = {str(f) for f in functions}
    assert not any(word in name for name in names for word in ("assert", "_and_", "autocast", "cond"))
    assert not any(name.startswith("aten.to.") for name in names)
