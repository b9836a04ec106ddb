"""What `make gpu` measures on a GPU, and the laboratories of its kernels."""
