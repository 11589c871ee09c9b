"""Compiles a decode step in the pieces between its attention operators: pieces that are alike, only once.

The piece between two attention operators is the end of a layer and the beginning of the next one. In most
models all these pieces are alike, but for the weights, which are their inputs. So the time of a compilation
does not grow with the number of layers, except for Dynamo's part. No kernel is lost or added within a piece:
nothing can be fused across an operator that the compiler does not know.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.fx.passes.split_module import split_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def in_pieces(config, operator: OpOverload):
    """A copy of a `transformers.CompileConfig` with which a step is compiled in pieces between `operator`."""
    config = copy.copy(config)
    config.backend = _backend(config.backend, operator)
    return config


@functools.cache
def _backend(backend: str | Callable, operator: OpOverload) -> Callable:
    """Always the same object for the same arguments: Dynamo compiles anew for another one."""
    return functools.partial(compile_pieces, backend, operator)


def compile_pieces(
    backend: str | Callable,
    operator: OpOverload,
    graph: GraphModule,
    inputs: list,
    mode: str | None = None,
    options: dict | None = None,
) -> Callable:
    """Compile a graph of Dynamo, as a backend of `torch.compile` does.

    A graph without the operator is compiled as a whole.

    Args:
        backend: compiles a piece.
        operator: the graph is cut before and after it.
        graph: as Dynamo traced it. `inputs` are its arguments.
        mode, options: those of `torch.compile`, for the backend.
    """
    made = functools.partial(_compile, backend, mode, options)
    constants = (options or {}).get("freezing", inductor.freezing)  # then code depends on values of weights
    split = None if constants else _split(graph, operator)
    if split is None:
        return made(graph, inputs)
    compiled = {}
    pieces = {name: piece for name, piece in split.named_children() if not _has(piece, operator)}
    kinds = {name: _kind(piece) for name, piece in pieces.items()}
    for name, kind in kinds.items():
        if kind not in compiled:
            compiled[kind] = _compile_piece(made, pieces[name])
        delattr(split, name)  # the name is that of a module
        setattr(split, name, compiled[kind])
    return split


def _compile_piece(made: Callable, piece: GraphModule) -> Callable:
    """Compile a piece. Backends take graphs with several outputs only, and a piece may have one."""
    end = piece.graph.output_node()
    single = isinstance(end.args[0], Node)
    if single:
        end.args = ((end.args[0],),)
        piece.recompile()
    compiled = made(piece, _example_inputs(piece))
    return (lambda *inputs: compiled(*inputs)[0]) if single else compiled


def _compile(backend, mode: str | None, options: dict | None, graph: GraphModule, inputs: list) -> Callable:
    """What `torch.compile` calls with these options."""
    if backend == "inductor":
        options = options or (torch._inductor.list_mode_options(mode) if mode else {})
        return torch._inductor.compile(graph, inputs, options)
    given = {name: x for name, x in (("mode", mode), ("options", options)) if x}
    return torch._dynamo.lookup_backend(backend)(graph, inputs, **given)


def _split(graph: GraphModule, operator: OpOverload) -> GraphModule | None:
    """The graph as calls of modules: the pieces, and each operator by itself. None without the operator."""
    if not _has(graph, operator):
        return None
    part, parts = 0, {}
    for node in graph.graph.nodes:
        cut = _is(node, operator)
        part += cut
        parts[node] = part
        part += cut
    split = split_module(graph, None, parts.__getitem__, keep_original_order=True)
    inputs = (x for piece in split.children() for x in piece.graph.find_nodes(op="placeholder"))
    return split if all("example_value" in x.meta for x in inputs) else None


def _is(node: Node, operator: OpOverload) -> bool:
    return node.target in (operator, operator.overloadpacket)


def _has(piece: GraphModule, operator: OpOverload) -> bool:
    return any(_is(node, operator) for node in piece.graph.nodes)


def _example_inputs(piece: GraphModule) -> list:
    return [node.meta["example_value"] for node in piece.graph.find_nodes(op="placeholder")]


# -- what is alike


def _kind(piece: GraphModule) -> tuple:
    """All that the code of a piece depends on: operations, constants, and what its inputs are like."""
    number: dict[Node, int] = {}
    storages: dict[int, int] = {}
    kind: list = []

    def told(x):
        return f"%{number[x]}" if isinstance(x, Node) else f"{type(x).__name__} {x!r}"

    for node in piece.graph.nodes:
        number[node] = len(number)
        if node.op == "placeholder":
            kind.append(_input_kind(node.meta["example_value"], storages))
        elif node.op in ("get_attr", "call_module"):  # a constant or a function of this piece alone
            kind.append((node.op, id(piece), node.target))
        else:
            kind.append((node.op, node.target, repr(map_aggregate((node.args, node.kwargs), told))))
    return tuple(kind)


def _input_kind(x, storages: dict[int, int]) -> tuple:
    """What an input is like. `storages` numbers those of the inputs so far: inputs may share one."""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        return type(x), str(x) if isinstance(x, int | torch.SymInt) else id(x)
    if is_traceable_wrapper_subclass(x):  # a distributed tensor: what it says of itself, and its own part
        names, about = x.__tensor_flatten__()
        parts = (_input_kind(getattr(x, name), storages) for name in names)
        return type(x), str((*x.shape, *x.stride())), _hashable(about), x.requires_grad, *parts
    storage = storages.setdefault(x.untyped_storage()._cdata, len(storages))
    sizes = str((*x.shape, *x.stride(), x.storage_offset()))
    return type(x), sizes, x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg(), storage


def _hashable(x):
    """`x`, or an object that equals nothing else."""
    try:
        hash(x)
    except TypeError:
        return object()
    return x
