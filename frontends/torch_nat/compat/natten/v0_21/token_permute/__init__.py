"""Moving the tokens of a tile next to each other, as NATTEN does before its Hopper and Blackwell kernels."""

from torch_nat.compat.natten.v0_21.token_permute.frontend import token_permute_operation, token_unpermute_operation

__all__ = ["token_permute_operation", "token_unpermute_operation"]
