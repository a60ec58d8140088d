"""What stands between an operation and its Triton kernels: why they cannot run on given inputs, and the call."""
