"""Many models, or one model on much data, on the workers of Dask's ``distributed``."""
