"""natcore: Neighborhood Attention on raw arrays."""
