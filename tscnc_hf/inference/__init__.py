"""Networks made to run fast on a CPU from the zeros in their weights."""
