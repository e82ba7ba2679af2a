"""Ramps of sparsity, a file each."""
