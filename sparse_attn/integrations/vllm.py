"""vLLM plugin: prefill by a sparse method or a recipe, on the backend named CUSTOM.

    export SPARSE_ATTN_VLLM_CONFIG='{"method": "anchor", "options": {"theta": 12.0}, "min_keys": 8192}'
    vllm serve MODEL --attention-backend CUSTOM

vLLM finds `register` by its entry point (group `vllm.general_plugins`, name `sparse_attn`) and calls it in
each of its processes. Without the environment variable it does nothing at all.
"""

from __future__ import annotations

import os

from sparse_attn.integrations.vllm_config import ENV, load_settings

BACKEND = "sparse_attn.integrations.vllm_backend.SparseAttnBackend"
TESTED = "0.33"  # vLLM promises no stable interface to backends: only what was tested is accepted
ANY_VERSION = "SPARSE_ATTN_VLLM_ANY_VERSION"


def register() -> None:
    """Register the backend as CUSTOM. May be called any number of times.

    Raises:
        ValueError: bad settings, another vLLM than the tested one, or another plugin that holds CUSTOM.
    """
    if not os.environ.get(ENV):
        return
    import vllm

    check_version(vllm.__version__)
    load_settings()  # a bad setting is better told before a model is loaded
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        raise ValueError(
            f"sparse_attn: the vLLM backend CUSTOM is {custom.get_path()} already; leave that plugin out "
            f"with VLLM_PLUGINS=sparse_attn, or unset {ENV}."
        )
    register_backend(custom, BACKEND)


def check_version(found: str) -> None:
    """Raise ValueError unless `found` is a version of vLLM that this adapter was tested with.

    `SPARSE_ATTN_VLLM_ANY_VERSION=1` in the environment switches the check off.

    Example:
        >>> check_version("0.33.2")
    """
    if os.environ.get(ANY_VERSION) == "1" or found == TESTED or found.startswith(f"{TESTED}."):
        return
    raise ValueError(
        f"sparse_attn: found vLLM {found}; this adapter was tested with {TESTED}.x alone, and vLLM's "
        f"interface to attention backends changes between versions. Install vllm=={TESTED}.*, or set "
        f"{ANY_VERSION}=1 to try."
    )
