"""The generated C++ kernels on the CPU: the header they stand on, the compiler and the library of built ones."""
