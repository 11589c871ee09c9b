"""Functions of tensors that are kept compiled.

Each kernel is an eager PyTorch function. On CUDA its compiled version is compiled once per shape of its
buffers, with measured tile sizes instead of autotuning, so compiling takes seconds. The number of slots read
is data.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list as compiled_of
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils._pytree import tree_leaves, tree_map_only

from . import stored
from .inductor import pinned_tiles
from .start import without_collection
from .tiles import Tiles, power_of_two

#: Without `native_matmul`, a batched product cannot compute its operand from bytes. With `shape_padding`,
#: Inductor benchmarks at compile time whether to pad 4 query rows to 8; a padded product does not fuse. A
#: split reduction would compute the statistics of the scores in two kernels. With these thresholds,
#: `packed.force_materialize` alone decides where one kernel ends and the next begins.
OPTIONS = {
    "triton.native_matmul": True,
    "shape_padding": False,
    "use_fast_math": True,
    "split_reductions": False,
    "realize_opcount_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "realize_reads_threshold": 1000,
}
#: Resets the options of `row_products`, which compiles a model's step, for kernels compiled within the step.
APART = {"triton.native_matmul": False, "post_grad_custom_pre_pass": None}
#: One kernel for small, independent updates of several buffers.
TOGETHER = {"combo_kernels": True}


#: The thread's dispatch keys in its normal state; `Compiled` restores them.
PLAIN = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


#: Device types on which compiled versions run.
COMPILED_ON = {"cuda"}
#: Those whose compiled versions are kept on disk.
STORED_ON = {"cuda"}


def use_compiled(x: Tensor) -> bool:
    """Whether functions of tensors like `x` run as compiled versions."""
    return x.device.type in COMPILED_ON


def rounded(tokens: int) -> int:
    """The token count of the compiled version that serves `tokens` tokens: the next power of two."""
    return power_of_two(tokens)


def more_rows(x: Tensor, rows: int) -> Tensor:
    """`x` [..., n, D] padded with zero rows to `rows` rows. A single row, which broadcasts, stays single."""
    return x if x.shape[-2] == 1 else torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[-2]))


@functools.cache
def dynamic_size(n: int) -> Tensor:
    """A tensor whose length encodes `n`, so that a compiled graph does not depend on its value.

    The length is n + 1, because the compiler makes constants of 0 and 1.
    """
    marker = torch.empty(1, dtype=torch.uint8).expand(n + 1)
    torch._dynamo.mark_dynamic(marker, 0)
    return marker


@dataclass(frozen=True)
class Traced:
    """A function as `torch.compile` returned it, and the code object by which Dynamo finds its graphs."""

    graph: Callable
    code: types.CodeType

    def serves(self, *args) -> bool:
        """Whether it is compiled. `torch._dynamo.reset()` drops all graphs, and a new one needs its tiles."""
        return bool(compiled_of(self.code))

    def __call__(self, *args):
        return self.graph(*args)


@dataclass(frozen=True)
class Ahead:
    """A function that was compiled ahead of time.

    It knows no marks of dynamic dimensions, and needs none. Marks belong to objects, so it gets others.
    """

    graph: stored.Stored

    def serves(self, dynamic_sizes: list[Tensor], *args) -> bool:
        return self.graph.serves([*map(Tensor.detach, dynamic_sizes)], *args)

    def __call__(self, dynamic_sizes: list[Tensor], *args):
        return self.graph([*map(Tensor.detach, dynamic_sizes)], *args)


class Compiled:
    """The compiled version of a function of tensors: one graph per shape, with its tiles pinned.

    Args:
        function: its first argument is a list of tensors, the dynamic sizes.
        options: of Inductor.
        tiles: gives the tiles that `run` pins, from the other arguments of the function.
        remembers: whether the compiler remembers what an operation returns, to find that faster for the next
            one like it. Where sizes are data and most operations read views, hardly any two are alike, and
            remembering takes longer than finding out.
    """

    def __init__(
        self,
        function: Callable,
        options: dict = OPTIONS,
        tiles: Callable[..., Tiles] = lambda *args: {},
        remembers: bool = True,
    ):
        self.function, self.options, self.tiles = function, APART | options, tiles
        self.remembers = remembers
        self.graphs: dict[tuple, Traced | Ahead] = {}

    def __call__(self, dynamic_sizes: list[Tensor], pinned: Callable[[], Tiles], *args, **constants):
        """Call the compiled version on `args`.

        `dynamic_sizes` are tensors whose length may differ between calls.
        """
        return self._call(dynamic_sizes, pinned, args, constants)

    def run(self, like: Tensor, *args, **constants):
        """Call the function on `args`: compiled where tensors like `like` run compiled, otherwise eagerly.

        This is for functions without dynamic sizes. The eager function is looked up in its module at each
        call, so that a test can replace it there.
        """
        if like.device.type in COMPILED_ON:
            return self._call([], functools.partial(self.tiles, *args), args, constants)
        return self.function.__globals__[self.function.__name__]([], *args, **constants)

    def _call(self, dynamic_sizes: list[Tensor], pinned: Callable[[], Tiles], args: tuple, constants: dict):
        key = self.key_of(args, constants)
        # Inside the first call of another compiled graph, tensors show other dispatch keys than in later
        # calls. Then this function would be compiled again, and a CUDA graph capture does not allow that.
        with torch._C._ForceDispatchKeyGuard(*PLAIN):
            if not self._knows(key, dynamic_sizes, args):
                return self._first_call(key, dynamic_sizes, pinned, args, constants)
            return self.graphs[key](dynamic_sizes, *args)

    def key_of(self, args: tuple, constants: dict) -> tuple:
        """The key in `graphs` of a call with these arguments and constants, in the present mode."""
        # Dynamo guards on inference tensors and on the mode, and vLLM has steps of both kinds.
        return self._kinds(args), torch.is_inference_mode_enabled(), *constants.items()

    def _knows(self, key: tuple, dynamic_sizes: list[Tensor], args: tuple) -> bool:
        """Whether there is a graph for this call."""
        return key in self.graphs and self.graphs[key].serves(dynamic_sizes, *args)

    def _kinds(self, args: tuple) -> tuple:
        """What distinguishes calls that need graphs of their own, beside constants."""
        return tuple(
            (x.shape, x.stride(), x.dtype, x.device, x.is_inference()) if isinstance(x, Tensor) else x
            for x in tree_leaves(args)
        )

    def _marked(self, args: tuple) -> tuple:
        """The same arguments. Dimensions of which the graph must not depend are marked as dynamic."""
        return args

    def _first_call(
        self,
        key: tuple,
        dynamic_sizes: list[Tensor],
        pinned: Callable[[], Tiles],
        args: tuple,
        constants: dict,
    ):
        tiles = pinned()
        bound = bind(self.function, constants)
        with self._compiling(tiles):
            # A graph that does not serve this call is replaced by one of Dynamo, which makes further ones.
            graph = None if key in self.graphs else self._ahead(bound, key, tiles, dynamic_sizes, args)
            if graph is None:
                graph = Traced(torch.compile(bound, fullgraph=True, options=self.options), bound.__code__)
                result = graph(dynamic_sizes, *self._marked(args))
            else:
                result = graph(dynamic_sizes, *args)
        self.graphs[key] = graph
        return result

    def _ahead(
        self, bound: Callable, key: tuple, tiles: Tiles, dynamic_sizes: list[Tensor], args: tuple
    ) -> Ahead | None:
        """The graph from disk, or compiled and stored; None if it cannot be stored, or not for this call."""
        device = next((x.device for x in tree_leaves(args) if isinstance(x, Tensor)), torch.device("cpu"))
        if device.type not in STORED_ON:
            return None
        name = stored.name_of(self.function, device, self.options, key, tiles)
        if name is None:
            return None
        sizes = [*map(Tensor.detach, dynamic_sizes)]
        marked = dynamic_sizes, *self._marked(args)
        graph = stored.found(name, bound, self.options, (sizes, *args), marked)
        return graph and Ahead(graph)

    @contextlib.contextmanager
    def _compiling(self, tiles: Tiles) -> Iterator[None]:
        """How functions are compiled in this context."""
        with (
            pinned_tiles(tiles),
            torch.compiler.config.patch(cache_key_tag=str(tiles)),  # for graphs in the disk cache
            torch._dynamo.config.patch(
                automatic_dynamic_shapes=False,  # except `dynamic_sizes`
                fake_tensor_cache_enabled=self.remembers,
            ),
            symbolic_shapes.patch(use_duck_shape=False),  # equal lengths may differ later
            without_collection(),
        ):
            yield


class CompiledForSizes(Compiled):
    """The compiled version of a function of tensors [heads, ..., tokens]: one graph for all such sizes.

    The first argument says how many heads and tokens there are. An axis of size 1 needs a graph of its own,
    because the compiler makes constants of 0 and 1.
    """

    def _kinds(self, args):
        kinds = []
        for x, free in self._free_axes(args):
            shape = [min(size, 2) if axis in free else size for axis, size in enumerate(x.shape)]
            kinds.append((*shape, *free, x.dtype, x.device, x.is_inference()))
        return tuple(kinds)

    def _marked(self, args):
        args = tree_map_only(Tensor, Tensor.detach, args)  # marks must not stay on tensors of others
        for x, free in self._free_axes(args):
            for axis in free:
                torch._dynamo.maybe_mark_dynamic(x, axis)
        return args

    @staticmethod
    def _free_axes(args: tuple) -> list[tuple[Tensor, list[int]]]:
        """Each tensor, and its axes that count heads or tokens."""
        heads, tokens = args[0].shape[0], args[0].shape[-1]
        found = []
        for x in tree_leaves(args):
            axes = [(0, heads), (x.dim() - 1, tokens)] if x.dim() > 1 else []
            found.append((x, [axis for axis, size in axes if x.shape[axis] == size]))
        return found


def bind(function: Callable, constants: dict) -> Callable:
    """`function` with `constants` bound, and with a new code object.

    Dynamo keeps only a few graphs per code object, and here every shape needs a graph.
    """

    def bound(*args):
        return function(*args, **constants)

    code = bound.__code__.replace(co_name=function.__name__)
    return types.FunctionType(code, bound.__globals__, function.__name__, None, bound.__closure__)
