"""Channels, hidden units and heads: gates on them, cutting them out."""
