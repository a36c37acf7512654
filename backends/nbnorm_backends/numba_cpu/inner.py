"""How functions are compiled that only kernels call: as a part of the kernel, not on their own.

Numba makes machine code of every function that it compiles, with all that this one calls; of the forty functions of a
kernel only the outermost is ever called by its address. Without the code of the others, compiling layer norm takes 0.89
of its time, and its gradient 0.81 (medians of four, AVX2). Not to optimize them either, before their callers are, would
take 0.8 and 0.7, but leaves loops without vectors that are with them: gradients of layer norm took up to 1.7.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class Linked(JITCodeLibrary):
    """Code that waits for its callers: it is optimized with what it calls, and nothing more."""

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # there is nothing that Python or C could call

    def finalize(self) -> None:
        for library in dict.fromkeys(self._linking_libraries):
            if hasattr(library, "_reload_init"):  # from Numba 0.63 on
                self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._optimize_final_module()
        self._finalize_dynamic_globals()
        self._finalized = True

    @property
    def codegen(self) -> Linked:
        """Where Numba stores the environment, for exceptions: code that is nowhere has none."""
        return self

    def set_env(self, name: str, env: Any) -> None:
        pass


class Inner(Compiler):
    """The pipeline of such functions: the `pipeline_class` of `numba.njit`."""

    def __init__(self, typing: Any, target: Any, library: Any, *rest: Any) -> None:
        super().__init__(typing, target, library, *rest)
        if library is None:
            self.state.library = Linked(self.state.targetctx.codegen(), "inner")
            self.state.library.enable_object_caching()
