"""`sparse-attn demo`: every method on a real model or on the shape it was made for, in one table."""
