"""Sparse autoencoders: parameters, activations, alignment, optimizer. Imports neither Ray nor FastAPI.

Shapes, everywhere: d_in = width of an activation, d_sae = features of the whole dictionary, n_local = features of
this shard, batch = tokens of the whole step, nnz = active (token, feature) pairs.
"""
