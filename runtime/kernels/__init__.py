"""Native kernels: finding a compiler, building what is generated, and calling it from torch."""
