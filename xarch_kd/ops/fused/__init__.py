"""Launchers of the Triton kernels, and the reasons why a kernel cannot run on given inputs."""
