"""Arithmetic on tuples, entry by entry."""


def ceil_div_int(x: int, y: int) -> int:
    return -(-x // y)


def ceil_div_tuple(X: tuple, Y: tuple) -> tuple:
    return tuple(ceil_div_int(x, y) for x, y in zip(X, Y, strict=True))


def mul_tuple(X: tuple, Y: tuple) -> tuple:
    return tuple(x * y for x, y in zip(X, Y, strict=True))


def sub_tuple(X: tuple, Y: tuple) -> tuple:
    return tuple(x - y for x, y in zip(X, Y, strict=True))


def create_dim_from_int(na_dim: int, value: int) -> tuple[int, ...]:
    return (value,) * na_dim


def create_causal_arg_from_bool(na_dim: int, value: bool) -> tuple[bool, ...]:
    return (value,) * na_dim
