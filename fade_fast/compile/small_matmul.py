"""Products of one row, or of a few, with a matrix of weights, as Inductor generates them.

A step of decoding reads every weight for a single row, or for one of each text. A library's products do that
below the bandwidth there is, and each is a kernel or two of its own; those that Inductor generates also take
in what surrounds them: a bias, a residual, the gate of an MLP. Of one row they are sums, of 2 to 8 rows
loops over tiles for the tensor cores, summed and passed on in float32.
"""

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

PRODUCTS = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
LEAST = 256  # summands, and results, of a product worth it
MOST = 8  # rows that there are tiles for: of 16, a library's products are as fast
WHOLE = 64  # summands and results come in multiples of it, or the library has them: tiles need no masks


def tile(summands: int) -> dict:
    """Block sizes, warps and stages: one set for all shapes, measured on an H100 (docs/lab-notebook.md)."""
    block = min(2048, 1 << (summands - 1).bit_length())
    return dict(XBLOCK=1, R0_BLOCK=block, num_warps=max(1, block // 512), num_stages=1)


#: The same for 2 to 8 rows, by the most results of a row that they are for, measured likewise.
FEW = {
    2047: (8, 256, 1, 6),
    8191: (32, 256, 2, 5),
    65535: (64, 128, 4, 3),
    float("inf"): (64, 128, 4, 5),
}


def few_tile(results: int, summands: int) -> dict:
    """Tiles of products of a few rows; `results` is of each row."""
    width, block, warps, stages = next(tiles for most, tiles in FEW.items() if results <= most)
    dividing = lambda block, n: min(block, n & -n)  # noqa: E731
    return dict(
        YBLOCK=8, XBLOCK=dividing(width, results), R0_BLOCK=dividing(block, summands),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


class RowProducts(CustomGraphPass):
    """Turns `mm` and `addmm` of one row [1, K] with [K, N] into sums; those of several rows stay.

    Of these, Inductor asks `of_few_rows` as it meets them.
    """

    def __call__(self, graph: Graph) -> None:
        aten, force_materialize = torch.ops.aten, {}

        def call(op, *args) -> Node:
            node = graph.call_function(op, args)
            node.meta["val"] = op(*(x.meta["val"] if isinstance(x, Node) else x for x in args))
            return node

        for node in list(graph.nodes):
            if node.target not in PRODUCTS or node.kwargs:
                continue
            *bias, row, matrix = node.args
            if not _worth_it(row.meta["val"], matrix.meta["val"]):
                continue
            source = row
            while source.target in (aten.view.default, aten.reshape.default):  # each product has its own
                source = source.args[0]
            with graph.inserting_before(node):
                # As `packed.force_materialize`: or each result would compute the row anew.
                if source not in force_materialize:
                    like = row.meta["val"]
                    force_materialize[source] = call(
                        aten.as_strided.default, row, list(like.shape), list(like.stride())
                    )
                terms = call(
                    aten.mul.Tensor, call(aten.unsqueeze.default, force_materialize[source], 2), matrix
                )
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


def of_few_rows(node: Node, rows: int) -> bool:
    """Whether Inductor is to generate this product of `rows` rows, which may be a hint of how many there are.

    Weights have to be in half precision, and stored as `nn.Linear` does, summands last.
    """
    if node.target not in PRODUCTS or not 2 <= rows <= MOST:
        return False
    row, matrix = (x.meta["val"] for x in node.args[-2:])
    if row.device.type != "cuda" or not row.dtype == matrix.dtype in (torch.bfloat16, torch.float16):
        return False
    return all(
        isinstance(n, int) and n >= LEAST and n % WHOLE == 0 for n in matrix.shape
    ) and matrix.stride() == (1, matrix.shape[0])
