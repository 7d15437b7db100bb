"""Images and weights made worse, and the objectives on them."""
