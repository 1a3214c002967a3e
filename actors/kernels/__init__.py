"""Compiled kernels for the CPU: C source shipped with the package, built once per machine with its own compiler."""
