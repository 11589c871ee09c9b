"""Products of one row with a matrix of weights, as Inductor generates them: as sums.

Decoding one text, a step reads every weight for a single row. A library's products do that below the
bandwidth there is, and each is a kernel or two of its own; a sum that Inductor generates also takes in what
surrounds it: a bias, a residual, the gate of an MLP.
"""

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

LEAST = 256  # summands, and results, of a product worth it


def tile(summands: int) -> dict:
    """Block sizes, warps and stages: one set for all shapes, measured on an H100 (docs/lab-notebook.md)."""
    block = min(2048, 1 << (summands - 1).bit_length())
    return dict(XBLOCK=1, R0_BLOCK=block, num_warps=max(1, block // 512), num_stages=1)


class RowProducts(CustomGraphPass):
    """Turns `mm` and `addmm` of one row [1, K] with [K, N] into sums; those of several rows stay."""

    def __call__(self, graph: Graph) -> None:
        aten, written = torch.ops.aten, {}

        def call(op, *args) -> Node:
            node = graph.call_function(op, args)
            node.meta["val"] = op(*(x.meta["val"] if isinstance(x, Node) else x for x in args))
            return node

        for node in list(graph.nodes):
            if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
                continue
            *bias, row, matrix = node.args
            if not _worth_it(row.meta["val"], matrix.meta["val"]):
                continue
            source = row
            while source.target in (aten.view.default, aten.reshape.default):  # each product has its own
                source = source.args[0]
            with graph.inserting_before(node):
                # As `packed.written`: or each result would compute the row anew.
                if source not in written:
                    like = row.meta["val"]
                    written[source] = call(
                        aten.as_strided.default, row, list(like.shape), list(like.stride())
                    )
                terms = call(aten.mul.Tensor, call(aten.unsqueeze.default, written[source], 2), matrix)
                out = call(aten.sum.dim_IntList, terms, [1])
                for x in bias:
                    out = call(aten.add.Tensor, out, x)
            node.replace_all_uses_with(out)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        """What graphs kept on disk are known by, the tiles included."""
        return get_hash_for_files((__file__,))


def _worth_it(row: Tensor, matrix: Tensor) -> bool:
    sizes = (*row.shape, *matrix.shape)
    return all(isinstance(n, int) for n in sizes) and sizes[0] == 1 and min(sizes[1:]) >= LEAST
