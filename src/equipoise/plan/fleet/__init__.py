"""A simulated fleet: ranks that serve queries through MoE layers, in NumPy and step by step."""
