"""Chunked implementations in PyTorch alone: gradients in closed form, no intermediate the size of the whole problem."""
