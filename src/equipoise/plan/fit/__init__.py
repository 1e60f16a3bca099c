"""Does a model fit: parameters, memory per rank, communication, and what to change if it doesn't. Arithmetic alone."""
