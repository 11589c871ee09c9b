"""Functions of tensors that are kept compiled for a CPU, as loops over any number of rows and tokens."""

import functools
import types
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list as compiled_of
from torch.fx.experimental import _config as symbolic_shapes

from .compiled import APART, PLAIN, bind


@functools.cache
def available() -> bool:
    """Whether there is a C++ compiler for Inductor."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception:  # noqa: BLE001 - whatever the reason: eager steps need none
        return False
    return True


#: Products and sums of one instruction: they round once, and so are no less exact.
OPTIONS = APART | {"cpp.enable_floating_point_contract_flag": "fast"}


class Loops:
    """The compiled version of a function of tensors, for any number of rows and tokens.

    Args:
        function: compiled once for each set of constants, which must tell its dtypes and fixed sizes.
        lengths: yields `(tensor, dimension)` for each dimension of its arguments that is data.
    """

    def __init__(self, function: Callable, lengths: Callable[..., Iterable[tuple[Tensor, int]]]):
        self.function, self.lengths = function, lengths
        self.graphs: dict[tuple, tuple[Callable, types.CodeType]] = {}

    def __call__(self, threads: int, *args, **constants) -> Tensor:
        """Call the version for so many threads on `args`."""
        key = (threads, *constants.values())
        known = self.graphs.get(key)
        # `torch._dynamo.reset()` drops compiled versions.
        with torch._C._ForceDispatchKeyGuard(*PLAIN):
            if known is None or not compiled_of(known[1]):
                return self._first_call(key, args, constants)
            return known[0](*args)

    def _first_call(self, key: tuple, args: tuple, constants: dict) -> Tensor:
        bound = bind(self.function, constants)
        graph = torch.compile(bound, fullgraph=True, options=OPTIONS | {"cpp.threads": key[0]})
        for x, dim in self.lengths(*args):
            torch._dynamo.mark_dynamic(x, dim)
        with (
            torch.compiler.config.patch(cache_key_tag="loops"),  # graphs in the disk cache are like these
            torch._dynamo.config.patch(automatic_dynamic_shapes=False),  # except `lengths`
            # Equal lengths may differ later. One row or token, and a full buffer, are no special cases.
            symbolic_shapes.patch(use_duck_shape=False, backed_size_oblivious=True),
        ):
            result = graph(*args)
        self.graphs[key] = graph, bound.__code__
        return result
