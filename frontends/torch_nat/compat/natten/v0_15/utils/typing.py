"""A type that old Python did not name."""

NoneType = type(None)
