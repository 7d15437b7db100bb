"""What is measured, each on its own."""
