"""CPU kernels: the C++ support library, the compiler and the loader of compiled kernels."""
