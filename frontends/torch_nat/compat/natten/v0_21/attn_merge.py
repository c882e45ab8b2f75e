"""merge_attentions, where NATTEN 0.21 keeps it."""

from torch_nat.compat.natten._merging import merge_attentions

__all__ = ["merge_attentions"]
