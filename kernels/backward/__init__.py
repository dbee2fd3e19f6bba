"""Layers backward: gradients of inputs, weights, norms and activations over one gradient tile."""
