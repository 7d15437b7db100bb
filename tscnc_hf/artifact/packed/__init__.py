"""The packed file of docs/packed_format.md."""
