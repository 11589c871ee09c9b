"""A step that is compiled in pieces gives what the model gives. Alike pieces are compiled once."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import CompileConfig

from fade_fast.compile import pieces


@torch.library.custom_op("fade_tests::attend", mutates_args=())
def attend(x: Tensor, index: int) -> Tensor:
    """An operator that the compiler does not know. Each layer has its own number."""
    return x.cumsum(-1) * (index + 1)


@attend.register_fake
def _(x, index):
    return torch.empty_like(x)


OPERATOR = torch.ops.fade_tests.attend.default


class Layer(nn.Module):
    def __init__(self, index, width=16, scale=1.0, act=torch.tanh):
        super().__init__()
        self.index, self.scale, self.act = index, scale, act
        self.before, self.after = nn.Linear(16, width), nn.Linear(width, 16, bias=False)

    def forward(self, x, side):
        y = torch.ops.fade_tests.attend(self.before(x * self.scale) + side, self.index)
        return x + self.act(self.after(y))


class Model(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        side = x.mean(-1, keepdim=True).cos()
        for layer in self.layers:
            x = layer(x, side)
        return x.sin()


def compiled(model, *shapes, **options):
    """How many graphs a backend compiles for inputs of these shapes, whose results are compared."""
    torch._dynamo.reset()
    graphs, inner = [], torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return inner(graph, inputs)

    model = model.double().eval()
    cut = functools.partial(pieces.compile_pieces, backend, OPERATOR)
    with torch.no_grad():
        fast = torch.compile(model, backend=cut, fullgraph=True, **options)
        for shape in shapes:
            x = torch.randn(shape, dtype=torch.float64)
            assert torch.equal(fast(x), model(x))
    return len(graphs)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_alike_layers_are_compiled_once():
    assert compiled(Model(map(Layer, range(6))), (2, 16)) == 3


def test_rows_may_be_data():
    """The second number of rows is compiled for any number, as without pieces."""
    shapes = (2, 16), (5, 16), (7, 16), (9, 16)
    assert compiled(Model(map(Layer, range(4))), *shapes) == 6


DIFFERENT = {
    "shape": dict(width=32),
    "constant": dict(scale=1.0 + 2**-40),
    "kind of a constant": dict(scale=1),
    "operation": dict(act=torch.sin),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_layer_has_pieces_of_its_own(what):
    layers = [Layer(i, **DIFFERENT[what] if i == 3 else {}) for i in range(6)]
    found = compiled(Model(layers), (2, 16))
    # What differs may lie before the operator, behind it, or on both sides.
    assert found == {"shape": 5, "constant": 4, "kind of a constant": 4, "operation": 4}[what]


def test_strides_and_dtypes_of_weights_tell_layers_apart():
    layers = [Layer(i) for i in range(6)]
    layers[2].after.weight = nn.Parameter(torch.randn(16, 16).double().t())
    assert compiled(Model(layers), (2, 16)) == 4


def test_tensors_made_of_tensors_are_told_apart_by_their_parts():
    """As the weights of a tensor-parallel model are."""
    kinds = []
    for dtype in (torch.float32, torch.float32, torch.float64):
        x = TwoTensor(torch.randn(4, 4, dtype=dtype), torch.randn(4, 4, dtype=dtype))
        kinds.append(pieces._input_kind(x, {}))
    assert kinds[0] == kinds[1] != kinds[2]
    assert len({*kinds}) == 2 and pieces._hashable([]) != pieces._hashable([])


def test_layers_may_share_weights():
    layers = [Layer(i) for i in range(6)]
    for layer in layers[1:]:
        layer.after = layers[0].after
    assert compiled(Model(layers), (2, 16)) == 3


def test_a_buffer_that_a_layer_changes_is_its_own():
    class Counting(Layer):
        def __init__(self, index):
            super().__init__(index)
            self.register_buffer("calls", torch.full((1,), float(index)))

        def forward(self, x, side):
            self.calls.add_(1)
            return super().forward(x, side) * self.calls

    model = Model(map(Counting, range(6))).double()
    torch._dynamo.reset()
    cut = functools.partial(pieces.compile_pieces, "aot_eager", OPERATOR)
    x = torch.randn(2, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        for i, layer in enumerate(model.layers):
            layer.calls.fill_(i)
        assert torch.equal(torch.compile(model, backend=cut, fullgraph=True)(x), expected)
    assert [layer.calls.item() for layer in model.layers] == list(range(1, 7))


def test_graphs_without_the_operator_are_compiled_whole():
    assert compiled(nn.Linear(16, 16), (2, 16)) == 1


def test_graphs_with_the_values_of_weights_are_compiled_whole():
    model = Model(map(Layer, range(6)))
    with torch._inductor.config.patch(freezing=True):
        assert compiled(model, (2, 16)) == 1


def test_one_backend_for_equal_options():
    """Dynamo would compile anew for another one."""
    made = [pieces.in_pieces(CompileConfig(mode="default"), OPERATOR) for _ in range(2)]
    assert made[0].backend is made[1].backend and made[0].mode == "default"
    assert CompileConfig().backend == "inductor"


@pytest.mark.parametrize(
    "mode, options", [("default", None), ("max-autotune-no-cudagraphs", None), (None, {"b": 1})]
)
def test_inductor_gets_the_options_of_the_mode(monkeypatch, mode, options):
    seen = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, given: seen.append(given) or graph)
    config = pieces.in_pieces(CompileConfig(mode=mode, options=options), OPERATOR)
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
    config.backend(graph, [], **{k: v for k, v in (("mode", mode), ("options", options)) if v})
    assert seen == [options or torch._inductor.list_mode_options(mode)]
