"""What is typed: commands, options and what recipes share. Thin."""
