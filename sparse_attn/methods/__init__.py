"""The methods: each file holds a frozen config, a selector and an operator; this is the registry.

A sixth method is one file here, one line below, one literal reference in tests/references and one
test parameter.
"""

from sparse_attn.methods.base import Context, Method
from sparse_attn.methods.blasst import BLASST

METHODS: dict[str, Method] = {
    BLASST.name: BLASST,
}

__all__ = ["METHODS", "Context", "Method"]
