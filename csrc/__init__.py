"""C++ and CUDA C++. The CPU extension is compiled from it; kernels for GPUs are compiled where they run."""
