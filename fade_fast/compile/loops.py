"""Functions of tensors that are kept compiled for a CPU, as loops over any number of rows and tokens."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils._pytree import tree_map_only

from . import stored
from .compiled import APART, PLAIN, Traced, bind


@functools.cache
def available() -> bool:
    """Whether there is a C++ compiler for Inductor."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception:  # noqa: BLE001 - whatever the reason: eager steps need none
        return False
    return True


CPU = torch.device("cpu")
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
        self.graphs: dict[tuple, Traced | stored.Stored] = {}

    def __call__(self, threads: int, *args, **constants) -> Tensor:
        """Call the version for so many threads on `args`."""
        key = (threads, *constants.values())
        with torch._C._ForceDispatchKeyGuard(*PLAIN):
            if key not in self.graphs or not self.graphs[key].serves(*args):
                return self._first_call(key, args, constants)
            return self.graphs[key](*args)

    def _first_call(self, key: tuple, args: tuple, constants: dict) -> Tensor:
        bound, options = bind(self.function, constants), OPTIONS | {"cpp.threads": key[0]}
        marked = tree_map_only(Tensor, Tensor.detach, args)  # marks must not stay on tensors of others
        for x, dim in self.lengths(*marked):
            torch._dynamo.mark_dynamic(x, dim)
        with (
            torch.compiler.config.patch(cache_key_tag="loops"),  # graphs in the disk cache are like these
            torch._dynamo.config.patch(automatic_dynamic_shapes=False),  # except `lengths`
            # Equal lengths may differ later. One row or token, and a full buffer, are no special cases.
            symbolic_shapes.patch(use_duck_shape=False, backed_size_oblivious=True),
        ):
            graph = None
            if key not in self.graphs:  # as in `Compiled`, one that does not serve a call is replaced
                name = stored.name_of(self.function, CPU, options, *constants.items())
                graph = name and stored.found(name, bound, options, args, marked)
            if graph is None:
                graph = Traced(torch.compile(bound, fullgraph=True, options=options), bound.__code__)
                result = graph(*marked)
            else:
                result = graph(*args)
        self.graphs[key] = graph
        return result
