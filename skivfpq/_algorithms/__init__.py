"""The algorithms as functions on validated arrays; they know kernels, but no estimator."""
