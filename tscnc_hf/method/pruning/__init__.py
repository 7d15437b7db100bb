"""Which weights become zero, and when."""
