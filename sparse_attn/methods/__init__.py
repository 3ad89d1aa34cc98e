"""The methods: each file holds a frozen config, a selector and an operator; this is the registry.

A sixth method is one file here, one line below, one literal reference in tests/references and one
test parameter.
"""

from sparse_attn.methods.anchor import ANCHOR
from sparse_attn.methods.base import Context, Method
from sparse_attn.methods.blasst import BLASST
from sparse_attn.methods.s2 import S2
from sparse_attn.methods.sparsed import SPARSED
from sparse_attn.methods.vdit import VDIT

METHODS: dict[str, Method] = {
    BLASST.name: BLASST,
    ANCHOR.name: ANCHOR,
    S2.name: S2,
    VDIT.name: VDIT,
    SPARSED.name: SPARSED,
}

__all__ = ["METHODS", "Context", "Method"]
