"""The interfaces of other packages, answered by torch_nat."""
