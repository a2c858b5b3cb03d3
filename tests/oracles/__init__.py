"""Independent models in NumPy, float64 and int64, written from the equations.

Nothing here imports quantjax or JAX: agreement with the library means something.
"""
