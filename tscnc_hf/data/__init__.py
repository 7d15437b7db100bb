"""Images from anywhere to {"pixel_values": (c, h, w) in [0, 1], "labels": int}."""
