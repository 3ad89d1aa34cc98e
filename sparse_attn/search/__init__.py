"""The offline pattern search: from a model to a recipe (docs/search.md)."""
