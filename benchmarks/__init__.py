"""Measurements of natcore beside its peers. Nothing in the packages imports this."""
