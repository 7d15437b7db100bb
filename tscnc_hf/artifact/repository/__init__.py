"""A folder or a Hub id as a whole."""
