"""Package layout. `kernels/` and `bench/` stand at the top level and are imported as
`sparse_attn.kernels` and `sparse_attn.bench`."""

from setuptools import find_packages, setup

packages = find_packages(include=["sparse_attn", "sparse_attn.*"])
setup(
    packages=[*packages, "sparse_attn.kernels", "sparse_attn.bench"],
    package_dir={"sparse_attn.kernels": "kernels", "sparse_attn.bench": "bench"},
)
