"""What `nbnorm demo` runs: a small convolutional network in NumPy, trained with and without batch norm."""
