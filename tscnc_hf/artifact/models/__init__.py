"""A name or folder <-> a module."""
